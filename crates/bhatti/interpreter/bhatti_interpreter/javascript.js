// Runs JavaScript or TypeScript: node javascript.js LANGUAGE REQUESTS ANSWERS, with the numbers of
// two descriptors. Requests and answers are lines of JSON.
"use strict";

const fs = require("fs");
const net = require("net");
const readline = require("readline");
const repl = require("repl");
const { PassThrough } = require("stream");
const { inspect } = require("util");

const [language, requests, answers] = process.argv.slice(2);
process.argv.splice(1);

// Objects can say how they are shown: this method returns an object of MIME types and content.
const DISPLAY = Symbol.for("Jupyter.display");

// Lines of a stack that are not of the code.
const FOREIGN = /\((node:|.*javascript\.js:)|at node:|at new Promise \(<anonymous>/;

// Where Debian has the compiler of TypeScript.
const COMPILER = "/usr/share/nodejs/typescript";

const server = repl.start({
  prompt: "",
  input: new PassThrough(),
  output: new PassThrough().resume(),
  terminal: false,
  useGlobal: true,
  breakEvalOnSigint: true,
});

let compiler;

// Ends the execution that runs, if any, with an error.
let fail = null;
process.on("SIGINT", () => fail?.(new Error("interrupted")));

// The REPL passes errors to its domain: those of an execution, and those of code that runs on after
// its execution has ended.
const domain = server._domain;
domain.removeAllListeners("error");
domain.on("error", (error) => {
  if (fail) fail(error);
  else process.stderr.write(`Uncaught ${described(error).stack}\n`);
});

const lines = readline.createInterface({
  input: new net.Socket({ fd: Number(requests), readable: true, writable: false }),
  crlfDelay: Infinity,
});
lines.on("line", (line) => execute(JSON.parse(line)));

async function execute({ number, code, change }) {
  for (const [name, value] of Object.entries(change)) {
    if (value === null) delete process.env[name];
    else process.env[name] = value;
  }
  const answer = (content) =>
    fs.writeSync(Number(answers), JSON.stringify({ number, ...content }) + "\n");
  try {
    const value = await evaluate(plain(code), number);
    if (value !== undefined) answer({ data: await shown(value) });
    answer({ is_done: true });
  } catch (thrown) {
    answer({ error: described(thrown) });
  }
}

function evaluate(code, number) {
  return new Promise((resolve, reject) => {
    fail = reject;
    server.eval(code, server.context, `cell-${number}`, (error, value) => {
      if (error) reject(error instanceof repl.Recoverable ? error.err : error);
      // In an object, so that this promise does not wait for the value.
      else resolve({ value });
    });
  })
    .then(({ value }) => value)
    .finally(() => {
      fail = null;
    });
}

async function shown(value) {
  const display = value?.[DISPLAY];
  if (typeof display === "function") return await display.call(value);
  return { "text/plain": inspect(value) };
}

function described(thrown) {
  if (!(thrown instanceof Error)) {
    const message = inspect(thrown);
    return { name: "Error", message, stack: `Uncaught ${message}` };
  }
  const lines = String(thrown.stack).split("\n");
  const stack = lines.filter((line) => !FOREIGN.test(line)).join("\n");
  return { name: String(thrown.name), message: String(thrown.message), stack };
}

// Returns code that the REPL understands: without types, and with `await import()` in place of
// import statements.
function plain(code) {
  const isTypeScript = language === "typescript";
  if (!isTypeScript && !/^\s*import\b(?!\s*[(.])/m.test(code)) return code;
  compiler ??= require(COMPILER);
  const script = compiler.createSourceFile("cell.ts", code, compiler.ScriptTarget.Latest);
  for (const statement of [...script.statements].reverse()) {
    if (!compiler.isImportDeclaration(statement)) continue;
    const start = statement.getStart(script);
    code = code.slice(0, start) + imported(statement) + code.slice(statement.end);
  }
  if (!isTypeScript) return code;
  const { ScriptTarget: target, ModuleKind: module } = compiler;
  const compilerOptions = { target: target.ESNext, module: module.ESNext };
  return compiler.transpileModule(code, { compilerOptions }).outputText;
}

function imported({ importClause: clause, moduleSpecifier }) {
  const module = `await import(${JSON.stringify(moduleSpecifier.text)});`;
  if (!clause) return module;
  if (clause.isTypeOnly) return "";
  const names = clause.name ? [`default: ${clause.name.text}`] : [];
  const bindings = clause.namedBindings;
  if (bindings && compiler.isNamespaceImport(bindings)) {
    const namespace = bindings.name.text;
    const own = names.length ? ` const { ${names[0]} } = ${namespace};` : "";
    return `const ${namespace} = ${module}${own}`;
  }
  for (const { propertyName, name, isTypeOnly } of bindings?.elements ?? []) {
    if (isTypeOnly) continue;
    names.push(propertyName ? `${propertyName.text}: ${name.text}` : name.text);
  }
  return `const { ${names.join(", ")} } = ${module}`;
}
