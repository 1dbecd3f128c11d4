// Draws the figures of a report one after another, so that the words are there at once, and moves them together.
// All figures over progress show the same point: moving one slider, or the control above them, moves all.
// A page that loads itself again (data-refresh, in seconds) begins at the point where it was.
window.addEventListener("load", async () => {
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]] };
  const still = { mode: "immediate", frame: { duration: 0, redraw: true }, transition: { duration: 0 } };
  const control = document.querySelector(".control");
  const names = control ? JSON.parse(control.dataset.names) : [];
  const [range, said, play] = control ? ["input", "output", "button"].map(tag => control.querySelector(tag)) : [];
  const linked = []; // figures drawn so far that have frames
  const told = new Map(); // figure -> the frame it was sent to, until it says that it is there
  const key = "progress of " + document.title;
  const seconds = Number(document.body.dataset.refresh);
  let shown = null, playing = null;

  const keep = name => { try { sessionStorage.setItem(key, name); } catch (error) { /* no storage: begin anew */ } };
  const kept = () => { try { return sessionStorage.getItem(key); } catch (error) { return null; } };
  const send = (figure, name) => { told.set(figure, name); Plotly.animate(figure, [name], still); };
  const show = (name, from) => {
    if (name === shown) return;
    shown = name;
    keep(name);
    if (control) {
      range.value = names.indexOf(name);
      range.setAttribute("aria-valuetext", "progress " + name);
      said.textContent = name;
    }
    for (const figure of linked) if (figure !== from) send(figure, name);
  };

  if (control) {
    const stop = () => { clearInterval(playing); playing = null; play.textContent = "Play"; };
    const next = () => { if (+range.value + 1 < names.length) show(names[+range.value + 1], null); else stop(); };
    range.addEventListener("input", () => show(names[range.value], null));
    play.addEventListener("click", () => {
      if (playing !== null) return stop();
      if (+range.value + 1 === names.length) show(names[0], null);
      play.textContent = "Pause";
      playing = setInterval(next, 900);
    });
    if (seconds > 0 && names.includes(kept())) show(kept(), null);
  }

  const pause = () => new Promise(done => setTimeout(done)); // lets the browser show what is there, and listen
  await pause();
  for (const figure of document.querySelectorAll(".plotly-graph-div")) {
    const { data, layout, frames } = JSON.parse(figure.nextElementSibling.textContent);
    await Plotly.newPlot(figure, data, layout, config);
    if (frames && frames.length) {
      await Plotly.addFrames(figure, frames);
      if (figure.closest(".linked")) {
        linked.push(figure);
        figure.on("plotly_animatingframe", event => {
          if (told.get(figure) === event.name) told.delete(figure); else show(event.name, figure);
        });
        if (shown !== null) send(figure, shown);
      }
    }
    await pause();
  }
  document.body.dataset.drawn = "true";
  if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);
});
