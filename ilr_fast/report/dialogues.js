"use strict";
// The browser of dialogues: filters, a list that grows, and each dialogue's turns once it is opened. Everything that
// an agent or a data set said becomes text, never markup.
(async () => {
  const filters = document.getElementById("filters");
  if (!filters) return;
  const {runs, dialogues} = JSON.parse(await unpack("spoken"));
  const list = document.getElementById("list"), more = document.getElementById("more"), PAGE = 20;
  let shown = [], end = 0;

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined && text !== null) element.textContent = text;
    return element;
  }
  const verdict = right => right === null ? "" : right ? "right" : "wrong";
  const mark = right => right === null ? "·" : right ? "✓" : "✗";
  const colour = agent => "var(--s" + agent.colour + ")";

  function fits(dialogue, wanted) {
    if (wanted.run && runs[dialogue.run] !== wanted.run) return false;
    if (wanted.words) {
      const words = wanted.words.toLowerCase();
      const texts = [dialogue.id, dialogue.question, ...dialogue.agents.flatMap(a => a.turns.map(t => t.text))];
      if (!texts.some(text => text.toLowerCase().includes(words))) return false;
    }
    return dialogue.agents.some(agent =>
      (!wanted.agent || agent.name === wanted.agent) && (!wanted.change || agent.flip === wanted.change) &&
      agent.turns.some(turn => (!wanted.stage || turn.stage === wanted.stage) && (!wanted.mode || turn.mode === wanted.mode) &&
        (!wanted.answer || verdict(turn.right) === wanted.answer)));
  }

  function card(dialogue) {
    const box = make("details", "dialogue"), head = make("summary");
    head.append(make("b", "", (runs.length > 1 ? runs[dialogue.run] + " · " : "") + "step " + dialogue.step));
    for (const agent of dialogue.agents) {
      const chip = make("span", "chip"), dot = make("i");
      dot.style.background = colour(agent);
      chip.append(dot, agent.name + " ");
      agent.turns.forEach(turn => chip.append(make("em", verdict(turn.right), mark(turn.right))));
      if (/^(mended|spoiled)/.test(agent.flip)) chip.append(" " + agent.flip);
      head.append(chip);
    }
    if (dialogue.error) head.append(make("span", "tag wrong", "broken off"));
    head.append(make("span", "asked", dialogue.question.slice(0, 300)));
    box.append(head);
    box.addEventListener("toggle", () => { if (box.open && box.childElementCount === 1) fill(box, dialogue); });
    return box;
  }

  function fill(box, dialogue) {
    box.append(make("p", "question", dialogue.question));
    const expected = make("p", "note", "expected answer: "), level = dialogue.level ? " · level " + dialogue.level : "";
    expected.append(make("b", "", dialogue.expected), " · " + dialogue.id + " · dialogue " + dialogue.n + level);
    box.append(expected);
    if (dialogue.error) box.append(make("p", "note wrong", "broken off: " + dialogue.error));
    const stages = [...new Set(dialogue.agents.flatMap(agent => agent.turns.map(turn => turn.stage)))];
    for (const stage of stages) {
      const turns = make("div", "turns");
      for (const agent of dialogue.agents)
        agent.turns.filter(turn => turn.stage === stage).forEach(turn => turns.append(spoken(agent, turn)));
      box.append(make("h4", "", stage), turns);
    }
  }

  function spoken(agent, turn) {
    const box = make("article"), who = make("p", "who");
    box.style.borderColor = colour(agent);
    who.append(make("b", "", agent.name), " ", make("span", "tag " + turn.mode, turn.mode));
    if (turn.right !== null) who.append(" ", make("span", "tag " + verdict(turn.right), verdict(turn.right)));
    box.append(who, make("pre", "", turn.text || "(nothing)"), make("p", "numbers", turn.numbers));
    if (turn.told) {
      const told = make("details");
      told.append(make("summary", "", "what it was told"), make("pre", "", turn.told));
      box.append(told);
    }
    return box;
  }

  function grow() {
    list.append(...shown.slice(end, end + PAGE).map(card));
    end = Math.min(end + PAGE, shown.length);
    more.hidden = end >= shown.length;
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(filters));
    shown = dialogues.filter(dialogue => fits(dialogue, wanted));
    end = 0;
    list.replaceChildren();
    document.getElementById("found").textContent = shown.length + " of " + dialogues.length + " kept dialogues";
    grow();
  }
  filters.addEventListener("input", filter);
  filters.addEventListener("submit", event => event.preventDefault());
  more.onclick = grow;
  filter();
})().catch(report);
