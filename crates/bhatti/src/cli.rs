//! The command line: what there is. What each command takes is beside what it does.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    bench, completion, create, destroy, edit, events, exec, file, fork, forward, image, inspect,
    kill, lifecycle, list, logs, ports, ps, publish, secret, serve, setup, shell, snapshot,
    template, user, volume, wait,
};

/// Runs untrusted code and AI agents in real Linux microVMs on a machine you own.
#[derive(Debug, Parser)]
#[command(name = "bhatti", version, disable_help_subcommand = false, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What the help calls the options of every command.
const EVERYWHERE: &str = "Options of every command";

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the daemon keeps everything [default: /var/lib/bhatti for root, else ~/.local/share/bhatti]
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// A daemon on the network, http://HOST:PORT [default: what `bhatti setup --url` saved, else the one on this machine]
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_URL", value_name = "URL")]
    pub(crate) url: Option<String>,
    /// The API key for --url
    #[arg(long, global = true, help_heading = EVERYWHERE, env = "BHATTI_TOKEN", value_name = "KEY", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Print JSON
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub(crate) json: bool,
    /// Print no more than a script needs
    #[arg(short, long, global = true, help_heading = EVERYWHERE)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build what sandboxes boot from; or, with --url, remember which daemon to call
    Setup(setup::Setup),
    /// Run the daemon
    Serve(serve::Serve),
    /// Create a sandbox and wait until it is up
    Create(create::Create),
    /// List sandboxes
    #[command(visible_alias = "ls")]
    List(list::List),
    /// Show one sandbox
    #[command(visible_alias = "info")]
    Inspect(inspect::Inspect),
    /// Run a command in a sandbox
    Exec(exec::Exec),
    /// Open a terminal in a sandbox, or come back to one
    #[command(visible_alias = "sh")]
    Shell(shell::Shell),
    /// List the terminals and jobs of a sandbox
    Ps(ps::Ps),
    /// Kill terminals or jobs of a sandbox
    Kill(kill::Kill),
    /// Print what a job has written
    Logs(logs::Logs),
    /// Wait until a job has ended, and exit with its code
    Wait(wait::Wait),
    /// Change a sandbox: its name, its labels, whether it stays hot
    Edit(edit::Edit),
    /// Pause sandboxes until somebody uses them; their memory is kept
    Pause(lifecycle::Pause),
    /// Resume sandboxes that are paused or saved
    Resume(lifecycle::Resume),
    /// Stop sandboxes: save their memory and processes (a container loses them), until they are started
    Stop(lifecycle::Stop),
    /// Start sandboxes that were stopped, where they were
    Start(lifecycle::Start),
    /// Fork a running sandbox: its memory, its processes and its disk
    Fork(fork::Fork),
    /// Destroy sandboxes
    #[command(visible_alias = "rm")]
    Destroy(destroy::Destroy),
    /// Read, write and copy files of sandboxes
    File(file::File),
    /// Save sandboxes under a name, and make others of them
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    /// Manage volumes: file systems that outlive sandboxes
    #[command(subcommand)]
    Volume(volume::Volume),
    /// Manage secrets: variables whose values nothing shows again
    #[command(subcommand)]
    Secret(secret::Secret),
    /// Manage templates: what sandboxes have in common
    #[command(subcommand)]
    Template(template::Template),
    /// Manage images: what the disks of sandboxes begin as
    #[command(subcommand)]
    Image(image::Image),
    /// Publish a port of a sandbox: whoever knows its address reaches it
    Publish(publish::Publish),
    /// Take a published port back
    Unpublish(publish::Unpublish),
    /// List the ports that something listens at
    Ports(ports::Ports),
    /// Reach a port of a sandbox at a port of this machine, until interrupted
    Forward(forward::Forward),
    /// Manage the daemon's users
    #[command(subcommand)]
    User(user::User),
    /// Show what happened, and what happens
    Events(events::Events),
    /// Print what the daemon measures, in the text format of Prometheus
    #[command(after_help = "Example:\n  bhatti metrics | grep bhatti_http")]
    Metrics,
    /// Say what works on this machine, and how to mend what does not
    #[command(after_help = "Example:\n  bhatti doctor")]
    Doctor,
    /// Measure how fast sandboxes are made and used
    Bench(bench::Bench),
    /// Print a completion script for a shell
    Completion(completion::Completion),
    /// Print the version
    #[command(after_help = "Example:\n  bhatti version --json")]
    Version,
}

/// `NAME=VALUE`, whatever is behind the first equals sign.
pub(crate) fn parse_variable(text: &str) -> Result<(String, String), String> {
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
    fn variable_may_hold_anything_behind_the_first_equals_sign() {
        assert_eq!(parse_variable("A=b=c,d"), Ok(("A".into(), "b=c,d".into())));
        assert!(parse_variable("A").is_err());
    }

    /// Every command that does something, with the words that lead to it.
    fn leaves(command: &clap::Command, words: &str) -> Vec<(String, clap::Command)> {
        let below: Vec<_> =
            command.get_subcommands().filter(|sub| sub.get_name() != "help").collect();
        if below.is_empty() {
            return vec![(words.to_owned(), command.clone())];
        }
        let leaf = |sub: &&clap::Command| leaves(sub, format!("{words} {}", sub.get_name()).trim());
        below.iter().flat_map(leaf).collect()
    }

    #[test]
    fn every_command_has_an_example_that_it_understands() {
        for (words, command) in leaves(&Cli::command(), "") {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples: Vec<&str> = help
                .lines()
                .filter(|line| line.starts_with("  "))
                .filter_map(|line| line.find("bhatti ").map(|at| &line[at..]))
                .collect();
            assert!(!examples.is_empty(), "`{words}` has no example");
            for example in examples {
                let words = example.split(['|', '<', '>', '#']).next().unwrap_or_default();
                let words = words.replace('\'', "");
                let parsed = Cli::try_parse_from(words.split_whitespace());
                assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
            }
        }
    }

    #[test]
    fn help_is_what_it_was() {
        let mut text = String::new();
        let mut top = Cli::command();
        top.build();
        for (words, mut command) in leaves(&top, "") {
            command = command.term_width(100);
            text += &format!("==== bhatti {words}\n{}\n", command.render_help());
        }
        let top = Cli::command().term_width(100).render_help().to_string();
        insta::assert_snapshot!("help", format!("{top}\n{text}"));
    }
}
