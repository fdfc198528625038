"""A figure of one's own in the report: what parameters buy."""

from plotly.graph_objects import Figure

from contextlab import register


@register("figure", "what_parameters_buy", family="cost")
def what_parameters_buy(data):
    """Quality by parameters; a point is a model, the mean of its seeds."""
    rows = data.rows[data.rows["shot"].isna() & data.rows["split"].isin(["train", "cost"])]
    means = rows.pivot_table(index="model", columns="metric", values="value").dropna(subset="parameters")
    drawn = Figure().add_scatter(x=means["parameters"], y=means[data.metric], text=means.index, mode="markers+text")
    return drawn.update_layout(xaxis_title="parameters", yaxis_title=data.metric)
