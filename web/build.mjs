// Builds the files that are compiled into the daemon, in crates/bhatti-server/console or in the
// directory that the argument names. They are committed, so that building bhatti needs no Node.
import { build } from "esbuild";
import { copyFile, mkdir } from "node:fs/promises";
import { join } from "node:path";

const target = process.argv[2] ?? "../crates/bhatti-server/console";

await mkdir(target, { recursive: true });
await build({
  entryPoints: { app: "src/main.tsx" },
  outdir: target,
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "eof",
  charset: "utf8",
});
await copyFile("src/index.html", join(target, "index.html"));
