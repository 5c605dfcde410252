//! The settings that the host applies to this guest: a configuration after a boot, and a new
//! identity in each fork.

mod identity;
mod system;
mod texts;

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bhatti_proto::{AgentError, ConfigFile, ErrorKind, GuestConfig};
use subtle::ConstantTimeEq;
use tokio::time::timeout;

use crate::Agent;
use crate::file::{begin_as_agent, parse_mode, write_whole};
use crate::log;
use crate::refusal::{OpError, refused};
use crate::session::{start_init, start_kept};
use crate::surroundings::Surroundings;

pub(crate) use identity::assume;

/// How long writing the configured files may take. A file may be on a file system whose server is
/// frozen with the users' processes.
const FILES_LIMIT: Duration = Duration::from_secs(10);

/// The settings for new connections and processes.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    token: Option<Vec<u8>>,
    /// Variables of every process.
    pub(crate) environment: BTreeMap<String, String>,
    /// The user that processes run as.
    pub(crate) user: Option<String>,
    /// The directory in which processes start.
    pub(crate) workdir: Option<String>,
    /// The mount points of writable volumes.
    pub(crate) volumes: Vec<String>,
    configured: bool,
}

impl Settings {
    /// Whether connections must authenticate.
    pub(crate) const fn needs_token(&self) -> bool {
        self.token.is_some()
    }

    /// Whether `shown` is the token. Takes the same time for every wrong token of the right
    /// length.
    pub(crate) fn is_token(&self, shown: &[u8]) -> bool {
        self.token.as_ref().is_some_and(|token| token.ct_eq(shown).into())
    }

    fn take_over(&mut self, config: &GuestConfig) {
        self.token = some_text(&config.token).map(String::into_bytes);
        self.environment.clone_from(&config.env);
        self.user = some_text(&config.user);
        self.workdir = some_text(&config.workdir);
        if !self.configured {
            let written = config.volumes.iter().filter(|volume| !volume.read_only);
            self.volumes = written.map(|volume| volume.mount.clone()).collect();
        }
        self.configured = true;
    }
}

fn some_text(text: &str) -> Option<String> {
    Some(text).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Serves one `CONFIG_REQ`. After the first one that succeeds, all others are refused.
pub(crate) async fn configure(agent: &Rc<Agent>, config: &GuestConfig) -> Result<(), OpError> {
    if agent.settings.borrow().configured {
        return Err(refused(ErrorKind::AlreadyExists, "the guest is already configured").into());
    }
    match agent.place {
        Surroundings::Machine => system::apply(config)?,
        Surroundings::Container => system::apply_in_container(config)?,
        Surroundings::Process => {}
    }
    write_files(agent, config).await?;
    if agent.place.has_kernel()
        && let Err(error) = system::write_variables(&config.env)
    {
        log::line(format_args!("failed to write the sandbox's variables: {error}"));
    }
    agent.settings.borrow_mut().take_over(config);
    start_init_of(agent, &config.init);
    if timeout(FILES_LIMIT, start_kept(agent)).await.is_err() {
        log::line(format_args!("jobs of an earlier boot could not be read in time"));
    }
    Ok(())
}

/// Starts the init script, if there is one.
pub(crate) fn start_init_of(agent: &Rc<Agent>, script: &str) {
    if !script.is_empty() {
        start_init(agent, script);
    }
}

/// Makes the working directory if it is missing, and writes the configured files, on a thread for
/// files.
async fn write_files(agent: &Agent, config: &GuestConfig) -> Result<(), OpError> {
    let GuestConfig { files, workdir, .. } = config;
    if files.is_empty() && workdir.is_empty() {
        return Ok(());
    }
    let (files, workdir, is_guest) = (files.clone(), workdir.clone(), agent.place.is_guest());
    let writing = begin_as_agent(agent, move || {
        make_workdir(&workdir)?;
        files.iter().try_for_each(|(path, file)| write_file(path, file, is_guest))
    });
    let mut writing = writing.await?;
    let late = |_| {
        let message = format!("the files were not written within {} s", FILES_LIMIT.as_secs());
        refused(ErrorKind::Limit, message)
    };
    timeout(FILES_LIMIT, writing.end()).await.map_err(late)?
}

/// Makes the working directory of an image that names one that it does not have, as Docker does.
fn make_workdir(path: &str) -> Result<(), AgentError> {
    if path.is_empty() || Path::new(path).is_dir() {
        return Ok(());
    }
    let made = std::fs::create_dir_all(path);
    made.map_err(|error| {
        refused(ErrorKind::BadCwd, format!("make the working directory {path}: {error}"))
    })
}

fn write_file(path: &str, file: &ConfigFile, is_guest: bool) -> Result<(), AgentError> {
    let content = STANDARD.decode(&file.content);
    let content = content
        .map_err(|error| refused(ErrorKind::BadRequest, format!("content of {path}: {error}")))?;
    write_whole(path, &content, parse_mode(&file.mode)?, is_guest)
}
