// Two players of a comparison in step, and the difference between what they show.
(() => {
  const of = (pair) => (side) => pair.querySelector(`[data-side=${side}]`);
  const still = (view) => view.tagName === "IMG";
  const fps = (pair) => Number(pair.dataset.fps);

  function difference(pair) {
    const side = of(pair), a = side("dense"), b = side("fast"), canvas = side("difference");
    if (![a, b].every((view) => (still(view) ? view.complete : view.readyState >= 2))) return;
    const width = a.videoWidth || a.naturalWidth, height = a.videoHeight || a.naturalHeight;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const pen = canvas.getContext("2d");
    pen.globalCompositeOperation = "copy";
    pen.drawImage(a, 0, 0);
    pen.globalCompositeOperation = "difference";
    pen.drawImage(b, 0, 0);
    canvas.style.filter = `brightness(${pair.querySelector("[data-act=gain]").value})`;
    canvas.dataset.drawn = "yes";
  }

  function run(pair) {
    if (pair.dataset.running) return;
    pair.dataset.running = "yes";
    const tick = () => {
      const a = of(pair)("dense"), b = of(pair)("fast"), scrub = pair.querySelector("[data-act=scrub]");
      if (!pair.isConnected || !a || a.paused) {
        delete pair.dataset.running;
        return;
      }
      if (b.paused) b.play();
      if (Math.abs(a.currentTime - b.currentTime) > 0.5 / fps(pair)) b.currentTime = a.currentTime;
      scrub.value = Math.floor(a.currentTime * fps(pair) + 0.01);
      difference(pair);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  function pause(pair, paused) {
    const views = ["dense", "fast"].map(of(pair));
    views.forEach((view) => (paused ? view.pause() : view.play()));
    const button = pair.querySelector("[data-act=play]");
    button.textContent = paused ? "Play" : "Pause";
    if (!paused) run(pair);
  }

  const inside = (kind, handle) =>
    document.addEventListener(kind, (event) => {
      const pair = event.target.closest?.(".pair");
      if (pair) handle(pair, event.target);
    }, true);

  inside("loadeddata", difference);
  inside("load", difference);
  inside("seeked", difference);
  inside("playing", (pair) => run(pair));
  // On a narrow screen the result lies far below the button.
  document.addEventListener("click", (event) => {
    const shown = { generate: "result", compare: "compared" }[event.target.closest?.("button")?.id];
    if (shown && innerWidth < 700) document.getElementById(shown).scrollIntoView({ behavior: "smooth" });
  });
  inside("click", (pair, target) => {
    if (target.dataset.act === "play") pause(pair, !of(pair)("dense").paused);
  });
  inside("input", (pair, target) => {
    if (target.dataset.act === "gain") difference(pair);
    if (target.dataset.act !== "scrub") return;
    pause(pair, true);
    const time = (Number(target.value) + 0.5) / fps(pair);
    ["dense", "fast"].map(of(pair)).forEach((view) => (view.currentTime = time));
  });
})();
