// One person or two, each with titles marked as liked or disliked, and the list that follows from
// them. All that a visitor does stays here: the server is asked, and keeps nothing.

const WAIT = 120; // milliseconds after the last letter
const STAGES = ["first", "read", "why"];
const people = [];
let start;

class Person {
  constructor(number) {
    this.marked = { liked: [], disliked: [] };
    this.ranked = false;
    this.listed = [];
    this.found = [];
    this.chosen = -1;
    this.open = []; // of what is below the list
    const copy = document.querySelector("#person").content.cloneNode(true);
    this.root = copy.querySelector("section");
    this.parts = {};
    for (const element of copy.querySelectorAll("[data-part]")) {
      this.parts[element.dataset.part] = element;
      element.id = `${element.dataset.part}-${number}`;
    }
    document.querySelector("#people").append(copy);
    this.describe();
    this.listen();
  }

  describe() {
    const { label, search, found, results, name } = this.parts;
    label.htmlFor = search.id;
    search.setAttribute("aria-controls", found.id);
    search.setAttribute("aria-describedby", this.parts.hint.id);
    found.setAttribute("aria-label", "Titles found");
    this.root.setAttribute("aria-labelledby", name.id);
    this.parts.hint.textContent = `Of ${start.titles.toLocaleString("en")}; or one of your own.`;
    this.parts.dislikes.textContent = start.reads_dislikes
      ? "The model reads them as disliked."
      : "This model was trained on likes alone: they are left out of the list, and no more.";
    this.parts.vary.textContent = start.vary;
    this.parts.varied.checked = start.varied && Boolean(start.vary);
    this.parts.varied.closest("p").hidden = !start.vary;
    this.parts.cold.textContent = start.has_cf
      ? "As if nobody had rated anything: words and learned stand-ins are left."
      : "This model has no CF vectors in its slots to blank.";
    this.parts.blank.disabled = !start.has_cf;
    for (const part of ["varied", "blank"]) {
      const hint = this.parts[part === "varied" ? "vary" : "cold"];
      this.parts[part].setAttribute("aria-describedby", hint.id);
    }
    for (const example of start.examples) {
      const button = element("button", example.name, { type: "button" });
      button.addEventListener("click", () => this.begin(example.titles));
      this.parts.examples.append(button);
    }
    results.addEventListener("click", (event) => {
      const say = event.target.closest("[data-say]");
      if (say) this.mark(say.dataset.title, say.dataset.say === "like" ? "liked" : "disliked");
    });
    this.show();
  }

  listen() {
    const { search, found, rank, varied, blank } = this.parts;
    search.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.look(), WAIT);
    });
    search.addEventListener("keydown", (event) => this.press(event));
    search.addEventListener("blur", () => this.close());
    // The field keeps the focus, so that the list does not close before the click arrives.
    found.addEventListener("mousedown", (event) => event.preventDefault());
    found.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.take(Number(option.dataset.place));
    });
    rank.addEventListener("click", () => this.rank());
    for (const box of [varied, blank]) {
      box.addEventListener("change", () => this.ranked && this.rank());
    }
  }

  async look() {
    const text = this.parts.search.value.trim();
    if (!text) return this.close();
    const answer = await fetch(`search?q=${encodeURIComponent(text)}`);
    const { titles, same } = await answer.json();
    if (text !== this.parts.search.value.trim()) return; // later letters have been typed
    this.found = titles.map((title) => ({ title, says: title }));
    if (same === null) this.found.push({ title: text, says: `Take “${text}” as a new title` });
    const { found, search } = this.parts;
    const options = this.found.map(({ says }, place) =>
      element("li", says, { role: "option", id: `${found.id}-${place}`, "data-place": place }));
    found.replaceChildren(...options);
    found.hidden = false;
    search.setAttribute("aria-expanded", "true");
    this.parts.hint.textContent = titles.length
      ? `${titles.length} found: arrows choose, Enter takes.`
      : "No title is like this. It can be read by its words, as a new one.";
    this.choose(titles.length ? 0 : -1);
  }

  press(event) {
    const open = !this.parts.found.hidden;
    if (event.key === "Escape") this.close();
    else if (event.key === "ArrowDown" && !open) this.look();
    else if (event.key === "ArrowDown") this.choose((this.chosen + 1) % this.found.length);
    else if (event.key === "ArrowUp" && open) {
      this.choose((this.chosen + this.found.length - 1) % this.found.length);
    } else if (event.key === "Enter" && open && this.chosen >= 0) this.take(this.chosen);
    else if (event.key === "Enter") this.look();
    else return;
    event.preventDefault();
  }

  choose(place) {
    this.chosen = place;
    for (const [index, option] of [...this.parts.found.children].entries()) {
      option.setAttribute("aria-selected", String(index === place));
      if (index === place) option.scrollIntoView({ block: "nearest" });
    }
    if (place < 0) this.parts.search.removeAttribute("aria-activedescendant");
    else this.parts.search.setAttribute("aria-activedescendant", this.parts.found.children[place].id);
  }

  close() {
    clearTimeout(this.timer);
    this.parts.found.hidden = true;
    this.parts.search.setAttribute("aria-expanded", "false");
    this.parts.search.removeAttribute("aria-activedescendant");
  }

  take(place) {
    const { title } = this.found[place];
    this.parts.search.value = "";
    this.close();
    this.parts.hint.textContent = `${title} is liked.`;
    this.mark(title, "liked");
  }

  begin(titles) {
    this.marked = { liked: [...titles], disliked: [] };
    this.show();
    this.rank();
  }

  mark(title, where) {
    for (const list of Object.values(this.marked)) {
      if (list.includes(title)) list.splice(list.indexOf(title), 1);
    }
    if (where) this.marked[where].push(title);
    this.show();
    if (this.ranked) this.rank();
  }

  show() {
    for (const [kind, titles] of Object.entries(this.marked)) {
      const rows = titles.map((title, place) => {
        const row = element("li", title);
        const button = element("button", "Remove", { type: "button", "aria-label": `Remove ${title}` });
        button.addEventListener("click", () => {
          this.mark(title, null);
          const left = this.parts[kind].querySelectorAll("button");
          (left[Math.min(place, left.length - 1)] ?? this.parts.search).focus();
        });
        row.append(" ", button);
        return row;
      });
      this.parts[kind].replaceChildren(...(rows.length ? rows : [element("li", "none yet")]));
    }
  }

  async rank() {
    this.ranked = true;
    this.asked?.abort();
    this.asked = new AbortController();
    const { signal } = this.asked;
    const body = { ...this.marked, varied: this.parts.varied.checked, blank: this.parts.blank.checked };
    this.parts.results.setAttribute("aria-busy", "true");
    try {
      for (let next = 0; next < STAGES.length; next += 1) {
        const answer = await fetch("rank", {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ ...body, stage: STAGES[next] }),
          signal,
        });
        if (!answer.ok) throw new Error((await answer.json()).error);
        const list = await answer.json();
        this.put(list);
        next = STAGES.indexOf(list.stage);
      }
    } catch (problem) {
      if (signal.aborted) return; // a later list is on its way
      this.parts.status.textContent = `No list: ${problem.message}`;
    }
    this.parts.results.removeAttribute("aria-busy");
  }

  put({ status, html, titles }) {
    const { results } = this.parts;
    const rows = [...results.querySelectorAll("li")];
    const row = rows.findIndex((one) => one.contains(document.activeElement));
    const said = document.activeElement.dataset?.say;
    const shown = [...results.querySelectorAll("details")];
    if (shown.length) this.open = shown.map((more) => more.open);
    this.listed = titles;
    if (this.parts.status.textContent !== status) this.parts.status.textContent = status;
    results.innerHTML = html; // escaped by the server
    for (const [place, more] of results.querySelectorAll("details").entries()) {
      more.open = Boolean(this.open[place]);
    }
    // Whoever goes through the list by keys stays where they were.
    if (row >= 0) results.querySelectorAll("li")[row]?.querySelector(`[data-say=${said}]`)?.focus();
    compare();
  }
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Titles that stand in both lists are marked, and counted below the button.
function compare() {
  if (people.length < 2 || people.some((person) => !person.listed.length)) return;
  const shared = people[0].listed.filter((title) => people[1].listed.includes(title));
  for (const { parts } of people) {
    for (const title of parts.results.querySelectorAll(".ccf-title")) {
      title.closest("li").classList.toggle("ccf-shared", shared.includes(title.dataset.title));
    }
  }
  document.querySelector("#shared").textContent =
    `${shared.length} of ${people[0].listed.length} titles stand in both lists.`;
}

function arrange() {
  const two = people.length === 2;
  document.querySelector("#people").classList.toggle("ccf-two", two);
  const names = two ? ["First person", "Second person"] : ["You"];
  people.forEach((person, place) => { person.parts.name.textContent = names[place]; });
  const button = document.querySelector("#compare");
  button.textContent = two ? "Back to one person" : "Compare with another person";
  document.querySelector("#shared")?.remove();
  if (two) button.parentElement.append(element("span", "", { id: "shared", role: "status" }));
}

document.querySelector("#compare").addEventListener("click", () => {
  if (people.length === 2) people.pop().root.remove();
  else people.push(new Person(people.length));
  arrange();
});

start = await (await fetch("start")).json();
people.push(new Person(0));
arrange();
