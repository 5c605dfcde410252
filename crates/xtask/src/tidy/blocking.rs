//! Asynchronous code of the daemon does not wait for a disk on a worker thread.
//!
//! A call is found if it names the file system itself, or a function of the same crate that is not
//! `async` and that leads to such a call. Functions are found by their names, so this check knows
//! no types: it misses calls through traits and through methods whose names many types have.
//!
//! Work that may block belongs into a closure for `spawn_blocking` or `bhatti_host::blocking`.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::{File, Findings};

/// The crates whose code runs in the daemon's runtime.
const CRATES: [&str; 11] = [
    "bhatti-agent",
    "bhatti-control",
    "bhatti-docker",
    "bhatti-firecracker",
    "bhatti-image",
    "bhatti-net",
    "bhatti-node",
    "bhatti-qemu",
    "bhatti-secret",
    "bhatti-server",
    "bhatti-vmm",
];

/// Modules and types whose functions wait for a disk.
const BLOCKING: [&str; 6] = ["fs", "File", "DirBuilder", "OpenOptions", "durable", "disk"];

/// Methods that wait for a disk, whatever their type.
const BLOCKING_METHODS: [&str; 3] = ["sync_all", "sync_data", "set_len"];

/// Functions whose closures run on threads for blocking work.
const THREADS: [&str; 4] = ["spawn_blocking", "blocking", "on_thread", "on_disk"];

/// A function, or a method with its type.
type Name = (Option<String>, String);

/// A call.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    /// `module::function` or `Type::function`, the last two names.
    Path(Option<String>, String),
    /// `self.method`, with the type.
    Own(String, String),
    /// `value.method`.
    Method(String),
}

/// What a function does.
#[derive(Default)]
struct Function {
    is_async: bool,
    /// Calls on the thread that runs the function, or polls it.
    calls: Vec<(Call, usize)>,
}

/// The functions of a crate, with their files.
type Functions = Vec<(Name, String, Function)>;

/// Finds calls that block a worker thread.
pub(super) fn check(files: &[File], findings: &mut Findings) -> Result<()> {
    for name in CRATES {
        let prefix = format!("crates/{name}/src/");
        let mut functions = Functions::new();
        for file in files.iter().filter(|file| file.is_rust() && !file.is_test()) {
            if !file.path.starts_with(&prefix) {
                continue;
            }
            let parsed = syn::parse_file(file.code())
                .with_context(|| format!("failed to parse `{}`", file.path))?;
            let mut collector = Collector::new(&file.path, file.code());
            collector.visit_file(&parsed);
            functions.append(&mut collector.functions);
        }
        report(&functions, findings);
    }
    Ok(())
}

fn report(functions: &Functions, findings: &mut Findings) {
    let blocking = blocking(functions);
    for (_, path, function) in functions.iter().filter(|(_, _, function)| function.is_async) {
        for (call, line) in function.calls.iter().filter(|(call, _)| blocks(call, &blocking)) {
            let (Call::Path(_, name) | Call::Own(_, name) | Call::Method(name)) = call;
            let finding = format!("`{name}` waits for a disk in asynchronous code");
            findings.add(&format!("{path}:{line}"), &finding);
        }
    }
}

/// Returns the functions that are not `async` and lead to a call that blocks.
fn blocking(functions: &Functions) -> BTreeSet<Name> {
    let mut found = BTreeSet::new();
    loop {
        let before = found.len();
        for (name, _, function) in functions.iter().filter(|(_, _, function)| !function.is_async) {
            if function.calls.iter().any(|(call, _)| blocks(call, &found)) {
                found.insert(name.clone());
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

fn blocks(call: &Call, blocking: &BTreeSet<Name>) -> bool {
    match call {
        Call::Path(Some(place), _) if BLOCKING.contains(&place.as_str()) => true,
        Call::Path(Some(place), name) if place.starts_with(char::is_uppercase) => {
            blocking.contains(&(Some(place.clone()), name.clone()))
        }
        Call::Path(_, name) => blocking.contains(&(None, name.clone())),
        Call::Own(of, name) => blocking.contains(&(Some(of.clone()), name.clone())),
        Call::Method(name) => BLOCKING_METHODS.contains(&name.as_str()),
    }
}

/// Collects the functions of a file.
struct Collector {
    path: String,
    functions: Functions,
    /// The type whose methods are being visited.
    of: Option<String>,
    /// The functions around the code that is being visited.
    around: Vec<Function>,
    /// Whether `fs` is that of Tokio, which does not block.
    has_tokio_fs: bool,
}

impl Collector {
    fn new(path: &str, code: &str) -> Self {
        Self {
            path: path.to_owned(),
            functions: Vec::new(),
            of: None,
            around: Vec::new(),
            has_tokio_fs: code.contains("use tokio::fs"),
        }
    }

    fn function(&mut self, name: String, is_async: bool, visit: impl FnOnce(&mut Self)) {
        self.around.push(Function { is_async, calls: Vec::new() });
        visit(self);
        if let Some(function) = self.around.pop() {
            self.functions.push(((self.of.clone(), name), self.path.clone(), function));
        }
    }

    fn note(&mut self, call: Call, line: usize) {
        if let Some(function) = self.around.last_mut() {
            function.calls.push((call, line));
        }
    }
}

fn last_two(path: &syn::Path) -> (Option<String>, String) {
    let mut names = path.segments.iter().rev().map(|segment| segment.ident.to_string());
    let name = names.next().unwrap_or_default();
    (names.next(), name)
}

impl<'a> Visit<'a> for Collector {
    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        let of = match &*item.self_ty {
            syn::Type::Path(path) => Some(last_two(&path.path).1),
            _ => None,
        };
        let before = std::mem::replace(&mut self.of, of);
        visit::visit_item_impl(self, item);
        self.of = before;
    }

    fn visit_item_fn(&mut self, item: &'a syn::ItemFn) {
        let (name, of) = (item.sig.ident.to_string(), self.of.take());
        self.function(name, item.sig.asyncness.is_some(), |own| visit::visit_item_fn(own, item));
        self.of = of;
    }

    fn visit_impl_item_fn(&mut self, item: &'a syn::ImplItemFn) {
        let (name, is_async) = (item.sig.ident.to_string(), item.sig.asyncness.is_some());
        self.function(name, is_async, |own| visit::visit_impl_item_fn(own, item));
    }

    fn visit_expr_async(&mut self, item: &'a syn::ExprAsync) {
        self.function(String::new(), true, |own| visit::visit_expr_async(own, item));
    }

    fn visit_local(&mut self, local: &'a syn::Local) {
        let is_closure =
            local.init.as_ref().is_some_and(|init| matches!(*init.expr, syn::Expr::Closure(_)));
        if is_closure && let syn::Pat::Ident(name) = &local.pat {
            // A closure does not run where it is defined.
            self.function(name.ident.to_string(), false, |own| visit::visit_local(own, local));
            return;
        }
        visit::visit_local(self, local);
    }

    fn visit_expr_call(&mut self, call: &'a syn::ExprCall) {
        if let syn::Expr::Path(path) = &*call.func {
            let (place, name) = last_two(&path.path);
            if THREADS.contains(&name.as_str()) {
                let on_a_thread = |own: &mut Self| visit::visit_expr_call(own, call);
                return self.function(String::new(), false, on_a_thread);
            }
            let is_tokios = path.path.segments.first().is_some_and(|first| first.ident == "tokio")
                || (self.has_tokio_fs && place.as_deref() == Some("fs"));
            if !is_tokios {
                let place = match (place.as_deref(), &self.of) {
                    (Some("Self"), Some(of)) => Some(of.clone()),
                    _ => place,
                };
                self.note(Call::Path(place, name), call.span().start().line);
            }
        }
        visit::visit_expr_call(self, call);
    }

    fn visit_expr_method_call(&mut self, call: &'a syn::ExprMethodCall) {
        let (name, line) = (call.method.to_string(), call.method.span().start().line);
        if THREADS.contains(&name.as_str()) {
            let on_a_thread = |own: &mut Self| visit::visit_expr_method_call(own, call);
            return self.function(String::new(), false, on_a_thread);
        }
        let is_own = matches!(&*call.receiver, syn::Expr::Path(path) if path.path.is_ident("self"));
        match (&self.of, is_own) {
            (Some(of), true) => self.note(Call::Own(of.clone(), name), line),
            _ => self.note(Call::Method(name), line),
        }
        visit::visit_expr_method_call(self, call);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(code: &str) -> Vec<String> {
        let path = "crates/bhatti-node/src/code.rs".to_owned();
        let mut findings = Findings::default();
        check(&[File { path, text: code.to_owned() }], &mut findings).unwrap();
        findings.0
    }

    #[test]
    fn call_that_leads_to_the_disk_is_found_with_its_line() {
        let found = findings(
            "fn inner() { std::fs::read(\"x\"); }\nfn outer() { inner(); }\nimpl Store {\n    \
             fn save(&self) { outer(); }\n    async fn run(&self) {\n        self.save();\n    }\n}",
        );
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("code.rs:6: `save`"), "{found:?}");
        let found = findings("fn f() { tokio::spawn(async { file.sync_all() }); }");
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn call_on_a_thread_for_blocking_work_is_allowed() {
        let found = findings(
            "async fn a() { spawn_blocking(|| std::fs::read(1)); blocking(|| File::open(1)); }\n\
             async fn b() { tokio::fs::read(1).await; let work = || File::open(1); c(); }\n\
             fn c() { rename(1); }",
        );
        assert_eq!(found, Vec::<String>::new());
    }
}
