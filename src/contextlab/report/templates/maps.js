  // A prompt's tokens; what the one pointed at looks at is coloured (contextlab.report.maps has what it reads).
  addEventListener("DOMContentLoaded", async () => {
    const box = document.getElementById("maps-box"), held = document.getElementById("maps");
    const tokens = box.querySelector(".tokens"), told = box.querySelector(".told");
    const picker = Object.fromEntries([...box.querySelectorAll("select")].map((each) => [each.dataset.pick, each]));
    let models;
    try { models = JSON.parse(await unpackText(held.textContent, held.dataset)); } catch (error) { told.textContent = error.message; return; }
    let model, prompt, at = null;  // at: the number of the row that is shown

    const fill = (name, options) => {
      const before = picker[name].selectedIndex;
      picker[name].replaceChildren(...options.map((text, i) => new Option(text, i)));
      picker[name].selectedIndex = Math.max(0, Math.min(before, options.length - 1));
      picker[name].parentElement.hidden = options.length < 2;
    };
    const seen = (word) => word === "" ? "\u2205" : word.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/^ +$/, (s) => "\u2423".repeat(s.length));
    const shift = () => prompt.hidden ? 1 : 0;  // the first chip stands for all that are hidden
    const name = (chip) => shift() && !chip ? `the ${prompt.hidden} tokens before` : `${prompt.values.length ? "token" : `\u201c${seen(prompt.words[chip - shift()])}\u201d at`} ${prompt.hidden + chip - shift()}`;

    const draw = () => {
      model = models[picker.model.selectedIndex]; prompt = model.prompts[picker.prompt.selectedIndex];
      const rows = new Map(prompt.rows.map((place, row) => [place - prompt.hidden, row]));
      const chips = prompt.words.map((word, i) => {
        const chip = Object.assign(document.createElement("span"), { textContent: seen(word) });
        const place = prompt.hidden + i, wanted = prompt.wanted[place];
        chip.title = `place ${place}` + (prompt.values[i] ? `: ${prompt.values[i]}` : "") + (wanted ? `; wanted ${wanted[0]}, the model says ${wanted[1]}` : "");
        chip.role = "option";
        chip.classList.toggle("counts", !!wanted); chip.classList.toggle("mute", !rows.has(i));
        if (rows.has(i)) chip.dataset.row = rows.get(i);
        return chip;
      });
      if (prompt.hidden) chips.unshift(Object.assign(document.createElement("span"), { textContent: `\u2026 ${prompt.hidden} before`, className: "mute" }));
      tokens.replaceChildren(...chips);
      const counted = prompt.rows.findLastIndex((place) => place in prompt.wanted);
      if (at === null || at >= prompt.rows.length) at = counted < 0 ? prompt.rows.length - 1 : counted;
      colour();
    };
    const parts = () => fill("head", model.parts[picker.part.selectedIndex].heads);
    const colour = () => {
      const row = model.parts[picker.part.selectedIndex].maps[picker.prompt.selectedIndex][picker.head.selectedIndex][at] || [];
      const most = Math.max(1, ...row.map(Math.abs)), chips = [...tokens.children];
      chips.forEach((chip, i) => {
        const share = (row[i] || 0) / most, strength = Math.sqrt(Math.abs(share)) * .9;
        chip.style.background = !share ? "" : share > 0 ? `rgba(33, 102, 172, ${strength})` : `rgba(178, 24, 43, ${strength})`;
        chip.style.color = strength > .6 ? "#fff" : "";
        const asked = chip.dataset.row === String(at);
        chip.classList.toggle("at", asked); chip.ariaSelected = asked;
      });
      const place = prompt.rows[at], wanted = prompt.wanted[place], here = place - prompt.hidden + shift();
      const first = row.map((share, i) => [share, i]).filter(([share]) => Math.abs(share) >= 5).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 5);
      const looks = first.map(([share, i]) => `${i === here ? "itself" : name(i)} (${share < 0 ? "\u2212" : ""}${(Math.abs(share) / 10).toFixed(share % 10 ? 1 : 0)}%)`);
      const whose = name(here);
      told.textContent = `${whose[0].toUpperCase()}${whose.slice(1)} ${model.parts[picker.part.selectedIndex].heads[0] === "influence" ? "rests on" : "looks at"} ${looks.length ? looks.join(", ") : "nothing"}.`
        + (prompt.values[place - prompt.hidden] ? ` It is ${prompt.values[place - prompt.hidden]}.` : "")
        + (wanted ? ` Wanted: ${seen(wanted[0])}` + (wanted[1] ? `; the model says ${seen(wanted[1])}.` : ".") : "");
    };
    const change = (to) => { if (to !== at && to >= 0 && to < prompt.rows.length) { at = to; colour(); } };

    fill("model", models.map((each) => each.title));
    const chosen = () => {
      model = models[picker.model.selectedIndex];
      fill("prompt", model.prompts.map((_, i) => `${i + 1}`));
      fill("part", model.parts.map((each) => each.name));
      parts(); at = null; draw();
    };
    picker.model.addEventListener("change", chosen);
    picker.prompt.addEventListener("change", () => { at = null; draw(); });
    picker.part.addEventListener("change", () => { parts(); colour(); });
    picker.head.addEventListener("change", colour);
    for (const event of ["pointerover", "click"]) tokens.addEventListener(event, ({ target }) => target.dataset.row && change(+target.dataset.row));
    tokens.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) { event.preventDefault(); change(at + step); tokens.querySelector(".at")?.scrollIntoView({ block: "nearest" }); }
    });
    chosen();
  });
