//! The template `code-interpreter-v1`, in which E2B's package of that name runs code.

use std::io::{self, Cursor};
use std::sync::Arc;

use bhatti_api::{BuildTemplate, CopyFiles, TemplateStep};
use bhatti_client::{Client, Upload};
use bhatti_image::INTERPRETER_IMAGE;
use bhatti_server::{AppState, PublicAddress, StateParts, serve_unix};
use bhatti_store::Store;
use tar::{Builder, Header};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::commands::build_work::follow_log;
use crate::commands::{Context, control, serve};
use crate::config::Config;
use crate::error::CliError;

/// The template's name, which the package knows.
const NAME: &str = "code-interpreter-v1";

/// The package of Python that serves the kernels.
const PACKAGE: &str = "bhatti_interpreter";

/// Where Python finds the package, whatever its version.
const PACKAGES: &str = "/usr/lib/python3/dist-packages";

/// Lets `pip install` work outside a virtual environment: the sandbox is one.
const PIP: &str = r"printf '[global]\nbreak-system-packages = true\n' >/etc/pip.conf";

/// Starts the server, again if it ends. As root, so that code can install packages.
const START: &str =
    "exec sudo sh -c 'while :; do /usr/bin/python3 -P -m bhatti_interpreter; sleep 1; done'";

/// Succeeds when the kernels run.
const READY: &str = "curl -sf http://127.0.0.1:49999/health";

const CPUS: u64 = 2;
const MEMORY_MIB: u64 = 1024;

macro_rules! package {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../interpreter/bhatti_interpreter/", $name)))),*]
    };
}

/// The files of the package.
const FILES: [(&str, &str); 13] = package![
    "__init__.py",
    "__main__.py",
    "charts.py",
    "child.py",
    "contexts.py",
    "environment.py",
    "formats.py",
    "javascript.js",
    "jupyter.py",
    "kernel.py",
    "programs.py",
    "results.py",
    "server.py",
];

/// Builds the template, with the daemon that runs, or else with one that ends afterwards.
pub(super) async fn build_template(context: &Context) -> Result<(), CliError> {
    let client = Client::unix(&context.data_dir);
    let local = Context { data_dir: context.data_dir.clone(), client, output: context.output };
    match serve::try_lock(&context.data_dir)? {
        None => build(&local).await,
        Some(_lock) => with_daemon(&local).await,
    }
}

/// Serves the data directory on its socket while the template is built.
async fn with_daemon(context: &Context) -> Result<(), CliError> {
    let data_dir = &context.data_dir;
    let config = Config { ready_vmms: Some(0), ready_forks: Some(0), ..Config::read(data_dir)? };
    let store = Arc::new(Store::open(data_dir).map_err(|error| CliError::of(&error))?);
    let control = control::make(data_dir, &config, &store).await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let parts = StateParts {
        control: control.clone(),
        started: Instant::now(),
        public: PublicAddress { listener: None, zone: None, tls: false },
        proxy_limit: config.proxy_limit(),
        stopping: stopped,
    };
    let state = AppState::new(parts).map_err(|error| CliError::of(&error))?;
    let (end, ended) = oneshot::channel::<()>();
    let serving = serve_unix(state, data_dir, async { drop(ended.await) });
    let serving = tokio::spawn(serving.map_err(|error| CliError::of(&error))?);
    let built = build(context).await;
    stop.send_replace(true);
    drop(end);
    serving.await.map_err(io::Error::other)?;
    control.shut_down(false).await;
    built
}

async fn build(context: &Context) -> Result<(), CliError> {
    let began = Instant::now();
    let files = archive()?;
    let length = files.len() as u64;
    let files = Upload::new(Cursor::new(files), Some(length));
    let operation = context.client.build_template(&template(), files).await?;
    follow_log(context, operation).await?;
    if !context.output.json && !context.output.quiet {
        let seconds = began.elapsed().as_secs_f64();
        context.output.print(&format!("template `{NAME}`: ready after {seconds:.1} s"))?;
    }
    Ok(())
}

fn template() -> BuildTemplate {
    let root = TemplateStep::User("root".to_owned());
    let user = TemplateStep::User("user".to_owned());
    let copy = CopyFiles {
        from: PACKAGE.to_owned(),
        to: format!("{PACKAGES}/{PACKAGE}"),
        user: Some("root".to_owned()),
    };
    let home = TemplateStep::Workdir("/home/user".to_owned());
    BuildTemplate {
        name: NAME.to_owned(),
        image: Some(INTERPRETER_IMAGE.to_owned()),
        pull: Some("never".to_owned()),
        steps: vec![root, TemplateStep::Run(PIP.to_owned()), TemplateStep::Copy(copy), user, home],
        start: Some(START.to_owned()),
        ready: Some(READY.to_owned()),
        cpus: Some(CPUS),
        memory_mb: Some(MEMORY_MIB),
        public: true,
        ..BuildTemplate::default()
    }
}

/// Returns the package as a tar archive.
fn archive() -> io::Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    for (name, content) in FILES {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, format!("{PACKAGE}/{name}"), content.as_bytes())?;
    }
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn all_files_of_the_package_are_packed() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("interpreter").join(PACKAGE);
        let entries = std::fs::read_dir(directory).unwrap();
        let mut found: BTreeSet<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        found.retain(|name| name.ends_with(".py") || name.ends_with(".js"));

        let packed: BTreeSet<_> = FILES.iter().map(|(name, _)| (*name).to_owned()).collect();

        assert_eq!(packed, found);
    }
}
