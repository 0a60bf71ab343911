// node python314.js SCRIPT.py FOLDER PATH...: runs SCRIPT.py under pyodide's CPython with each PATH on sys.path; FOLDER is
// mounted under its own name and holds all of them.
const fs = require("fs");
const { loadPyodide } = require("pyodide");

(async () => {
  const [script, folder, ...paths] = process.argv.slice(2);
  const python = await loadPyodide({ env: { HOME: "/home/pyodide" } });
  python.FS.mkdirTree(folder);
  python.FS.mount(python.FS.filesystems.NODEFS, { root: folder }, folder);
  python.globals.set("PATHS", python.toPy(paths));
  try {
    python.runPython("import sys\nsys.dont_write_bytecode = True\nsys.path[:0] = PATHS\n" + fs.readFileSync(script, "utf8"));
  } catch (error) {
    console.log(error.message.split("\n").slice(-14).join("\n"));
    process.exit(1);
  }
})();
