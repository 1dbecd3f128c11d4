// Draws the figures of a report one after another, so that the words are there at once, and moves them together.
// All figures over progress show the same point, that of the control above them.
// A page that was loaded again (by itself every data-refresh seconds, or by its reader) begins as it was left.
window.addEventListener("load", async () => {
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]] };
  const still = { mode: "immediate", frame: { duration: 0, redraw: true }, transition: { duration: 0 } };
  const control = document.querySelector(".control");
  const names = control ? JSON.parse(control.dataset.names) : [];
  const [range, said, play] = control ? ["input", "output", "button"].map(tag => control.querySelector(tag)) : [];
  const details = Array.from(document.querySelectorAll("details"));
  const linked = []; // figures drawn so far that have frames
  const key = "state of " + document.title;
  const seconds = Number(document.body.dataset.refresh);
  let shown = null, playing = null;

  const send = (figure, name) => Plotly.animate(figure, [name], still).then(
    () => { figure.dataset.shows = name; },
    () => {}, // a later move has overtaken this one
  );
  const show = name => {
    if (name === shown) return;
    shown = name;
    if (control) {
      range.value = names.indexOf(name);
      range.setAttribute("aria-valuetext", "progress " + name);
      said.textContent = name;
    }
    for (const figure of linked) send(figure, name);
  };
  const stop = () => { clearInterval(playing); playing = null; play.textContent = "Play"; };
  const next = () => { if (+range.value + 1 < names.length) show(names[+range.value + 1]); else stop(); };
  const start = () => { play.textContent = "Pause"; playing = setInterval(next, 900); };

  const save = () => {
    const focus = [range, play].indexOf(document.activeElement);
    const open = details.map(one => one.open);
    const state = { name: shown, playing: playing !== null, focus, open };
    try { sessionStorage.setItem(key, JSON.stringify(state)); } catch (error) { /* no storage: begin anew */ }
  };
  const restore = () => {
    let state = null;
    try { state = JSON.parse(sessionStorage.getItem(key)); } catch (error) { /* as if there were none */ }
    if (!state || performance.getEntriesByType("navigation")[0]?.type !== "reload") return;
    if (names.includes(state.name)) show(state.name);
    if (state.open.length === details.length) details.forEach((one, i) => { one.open = state.open[i]; });
    if (control && state.focus >= 0) [range, play][state.focus].focus({ preventScroll: true });
    if (control && state.playing) start();
  };

  if (control) {
    range.addEventListener("input", () => show(names[range.value]));
    play.addEventListener("click", () => {
      if (playing !== null) return stop();
      if (+range.value + 1 === names.length) show(names[0]);
      start();
    });
  }
  restore();
  window.addEventListener("pagehide", save);
  const pause = () => new Promise(done => setTimeout(done)); // lets the browser show what is there, and listen
  try {
    await pause();
    for (const figure of document.querySelectorAll(".plotly-graph-div")) {
      const { data, layout, frames } = JSON.parse(figure.nextElementSibling.textContent);
      await Plotly.newPlot(figure, data, layout, config);
      if (frames && frames.length) {
        await Plotly.addFrames(figure, frames);
        if (figure.closest(".linked")) {
          linked.push(figure);
          figure.dataset.shows = frames[0].name;
          if (shown !== null) send(figure, shown);
        }
      }
      await pause();
    }
    document.body.dataset.drawn = String(Math.round(performance.now())); // milliseconds
  } finally {
    if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);
  }
});
