"""The recipes that come with contextlab: YAML files, each an ExperimentSpec."""
