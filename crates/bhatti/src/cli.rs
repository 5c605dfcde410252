//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use bhatti_api::{AttachVolume, NewVolume};
use clap::{Args, Parser, Subcommand};

/// Runs untrusted code and AI agents in real Linux microVMs on a machine you own.
#[derive(Debug, Parser)]
#[command(name = "bhatti", version, disable_help_subcommand = false, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the daemon keeps everything [default: /var/lib/bhatti for root, else ~/.local/share/bhatti]
    #[arg(long, global = true, env = "BHATTI_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// A daemon on the network, http://HOST:PORT [default: the one on this machine]
    #[arg(long, global = true, env = "BHATTI_URL", value_name = "URL", requires = "token")]
    pub(crate) url: Option<String>,
    /// The API key for --url
    #[arg(long, global = true, env = "BHATTI_TOKEN", value_name = "KEY", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build what sandboxes boot from: kernel, guest agent and root file system
    #[command(after_help = "Example:\n  bhatti setup")]
    Setup(Setup),
    /// Run the daemon
    #[command(after_help = "Example:\n  bhatti serve --listen 127.0.0.1:8080")]
    Serve(Serve),
    /// Create a sandbox and wait until it is up
    #[command(
        after_help = "Example:\n  bhatti create --name dev --cpus 2 --memory 1024 --env EDITOR=vi"
    )]
    Create(Create),
    /// List sandboxes
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti list")]
    List,
    /// Show one sandbox
    #[command(visible_alias = "info", after_help = "Example:\n  bhatti inspect dev")]
    Inspect(Target),
    /// Run a command in a sandbox
    #[command(
        after_help = "Example:\n  bhatti exec dev -- python3 -c 'print(6*7)'\n  tar c . | bhatti exec dev -- tar x -C /workspace\n\nExits with the command's own code; 125 if bhatti failed, 126 if the command cannot be executed, 127 if there is none."
    )]
    Exec(Exec),
    /// Pause sandboxes until somebody uses them; their memory is kept
    #[command(after_help = "Example:\n  bhatti pause dev")]
    Pause(Targets),
    /// Resume sandboxes that are paused or saved
    #[command(after_help = "Example:\n  bhatti resume dev")]
    Resume(Targets),
    /// Stop sandboxes: save their memory and processes, until they are started
    #[command(after_help = "Example:\n  bhatti stop dev")]
    Stop(Targets),
    /// Start sandboxes that were stopped, where they were
    #[command(after_help = "Example:\n  bhatti start dev")]
    Start(Start),
    /// Fork a running sandbox: its memory, its processes and its disk
    #[command(after_help = "Example:\n  bhatti fork dev --name try --count 3")]
    Fork(Fork),
    /// Destroy sandboxes
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti destroy dev")]
    Destroy(Targets),
    /// Save sandboxes under a name, and make others of them
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Manage volumes: file systems that outlive sandboxes
    #[command(subcommand)]
    Volume(Volume),
    /// Manage the daemon's users
    #[command(subcommand)]
    User(User),
    /// Say what works on this machine, and how to mend what does not
    #[command(after_help = "Example:\n  bhatti doctor")]
    Doctor,
    /// Print the version
    Version,
}

#[derive(Debug, Args)]
pub(crate) struct Setup {
    /// A kernel of your own, ELF vmlinux or bzImage [default: Debian's kernel for virtual machines]
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The modules of --kernel, as in /lib/modules/RELEASE [default: all that is needed is built in]
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// Do not boot a guest to fork sandboxes from; the first `create` does it then
    #[arg(long)]
    pub(crate) no_template: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Also listen on this address, for callers with an API key [default: the configuration's]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,
    /// Save all sandboxes when the daemon stops, rather than leave them to the next one
    #[arg(long)]
    pub(crate) stop_sandboxes: bool,
    /// Forget all secrets, and the key that they need, before starting: for a key that is lost
    #[arg(long)]
    pub(crate) forget_secrets: bool,
    /// How the log is written
    #[arg(long, value_enum, env = "BHATTI_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// A line for a person.
    Text,
    /// An object of JSON per line.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its name [default: a random one]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Its virtual CPUs [default: 1]
    #[arg(long, value_name = "COUNT")]
    pub(crate) cpus: Option<u64>,
    /// Its memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// A variable for its processes; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(crate) env: Vec<(String, String)>,
    /// Keep it hot, however long nobody uses it
    #[arg(long)]
    pub(crate) keep_hot: bool,
    /// Boot it, rather than fork it from a template
    #[arg(long)]
    pub(crate) cold_boot: bool,
    /// How it is connected: nat or none [default: as this host can]
    #[arg(long, value_name = "MODE")]
    pub(crate) network: Option<String>,
    /// A private range that it may reach all the same; may be given several times
    #[arg(long, value_name = "CIDR")]
    pub(crate) allow_cidr: Vec<String>,
    /// A volume that it has, mounted there, read-only with `:ro`; may be given several times
    #[arg(long, value_name = "NAME:/PATH[:ro]", value_parser = parse_volume)]
    pub(crate) volume: Vec<AttachVolume>,
    /// A volume of its own, which ends with it; may be given several times
    #[arg(long, value_name = "NAME:MIB:/PATH", value_parser = parse_new_volume)]
    pub(crate) new_volume: Vec<NewVolume>,
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Names or ids
    #[arg(required = true)]
    pub(crate) sandboxes: Vec<String>,
    /// Boot from the disk; what was in the memory is lost
    #[arg(long)]
    pub(crate) cold_boot: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Fork {
    /// Name or id of the parent
    pub(crate) sandbox: String,
    /// How many forks [default: 1]
    #[arg(long, value_name = "COUNT")]
    pub(crate) count: Option<u32>,
    /// The fork's name; several are called NAME-1, NAME-2, … [default: random ones]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// A variable for processes to come; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(crate) env: Vec<(String, String)>,
    /// Let processes to come have the parent's environment, too
    #[arg(long)]
    pub(crate) inherit_env: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Name or id
    pub(crate) sandbox: String,
}

#[derive(Debug, Args)]
pub(crate) struct Targets {
    /// Names or ids
    #[arg(required = true)]
    pub(crate) sandboxes: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Name or id
    pub(crate) sandbox: String,
    /// A variable for the command; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(crate) env: Vec<(String, String)>,
    /// The command's working directory [default: /workspace]
    #[arg(short = 'w', long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Save a running sandbox, which goes on
    #[command(after_help = "Example:\n  bhatti snapshot create dev ready")]
    Create {
        /// Name or id of the sandbox
        sandbox: String,
        /// The snapshot's name
        name: String,
    },
    /// List snapshots
    #[command(visible_alias = "ls")]
    List,
    /// Show one snapshot
    Inspect {
        /// Its name
        name: String,
    },
    /// Make a sandbox of a snapshot
    #[command(after_help = "Example:\n  bhatti snapshot resume ready --name again")]
    Resume {
        /// The snapshot's name
        snapshot: String,
        /// The sandbox's name [default: a random one]
        #[arg(long)]
        name: Option<String>,
        /// A variable for processes to come; may be given several times
        #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
        env: Vec<(String, String)>,
        /// Keep it hot, however long nobody uses it
        #[arg(long)]
        keep_hot: bool,
    },
    /// Delete snapshots; sandboxes that were made of them stay
    #[command(visible_alias = "rm")]
    Delete {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Volume {
    /// Make an empty volume
    #[command(after_help = "Example:\n  bhatti volume create data --size 4096")]
    Create {
        /// The volume's name
        name: String,
        /// Its size in MiB [default: 1024]
        #[arg(long, value_name = "MIB")]
        size: Option<u64>,
    },
    /// List volumes
    #[command(visible_alias = "ls")]
    List,
    /// Show one volume
    Inspect {
        /// Its name
        name: String,
    },
    /// Make a volume larger that no sandbox has
    #[command(after_help = "Example:\n  bhatti volume resize data --size 8192")]
    Resize {
        /// Its name
        name: String,
        /// Its size from now on, in MiB
        #[arg(long, value_name = "MIB")]
        size: u64,
    },
    /// Copy a volume that no sandbox writes
    #[command(after_help = "Example:\n  bhatti volume clone data data-2")]
    Clone {
        /// Its name
        name: String,
        /// The copy's name
        copy: String,
    },
    /// Delete volumes that no sandbox has, with all that is in them
    #[command(visible_alias = "rm")]
    Delete {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Make a user, and print the API key this once
    #[command(after_help = "Example:\n  bhatti user create alice")]
    Create {
        /// The user's name
        name: String,
    },
    /// List users
    List,
}

fn parse_volume(text: &str) -> Result<AttachVolume, String> {
    let (name, target) = text.split_once(':').ok_or("expected NAME:/PATH or NAME:/PATH:ro")?;
    let (target, readonly) = match target.strip_suffix(":ro") {
        Some(target) => (target, true),
        None => (target.strip_suffix(":rw").unwrap_or(target), false),
    };
    Ok(AttachVolume { name: name.to_owned(), target: target.to_owned(), readonly })
}

fn parse_new_volume(text: &str) -> Result<NewVolume, String> {
    let parts: Vec<&str> = text.splitn(3, ':').collect();
    let [name, size, mount] = parts[..] else {
        return Err("expected NAME:MIB:/PATH".to_owned());
    };
    let size_mb = size.parse().map_err(|_| format!("`{size}` is no number of MiB"))?;
    Ok(NewVolume { name: name.to_owned(), size_mb, mount: mount.to_owned() })
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn volumes_are_named_with_their_places() {
        let volume = parse_volume("data:/srv/x:ro").unwrap();
        assert_eq!((&*volume.name, &*volume.target, volume.readonly), ("data", "/srv/x", true));
        let volume = parse_volume("data:/a:b").unwrap();
        assert_eq!((&*volume.target, volume.readonly), ("/a:b", false));
        let own = parse_new_volume("tmp:64:/scratch").unwrap();
        assert_eq!((&*own.name, own.size_mb, &*own.mount), ("tmp", 64, "/scratch"));
        assert!(parse_volume("data").is_err());
        assert!(parse_new_volume("tmp:x:/scratch").is_err() && parse_new_volume("tmp:1").is_err());
    }

    #[test]
    fn variable_may_hold_anything_behind_the_first_equals_sign() {
        assert_eq!(parse_variable("A=b=c,d"), Ok(("A".into(), "b=c,d".into())));
        assert!(parse_variable("A").is_err());
    }
}
