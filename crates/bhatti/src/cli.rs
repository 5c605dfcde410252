//! The command line: its commands. The arguments of each command are beside its code.

use clap::{Parser, Subcommand};

use crate::commands::{
    bench, completion, create, destroy, edit, events, exec, file, fork, forward, image, inspect,
    jobs, key, kill, lifecycle, list, login, logs, man, ports, ps, publish, run, secret, serve,
    setup, shell, snapshot, template, user, volume, wait,
};
use crate::options::Global;

/// Run untrusted code and AI agents in real Linux microVMs on a machine you own.
#[derive(Debug, Parser)]
#[command(
    name = "bhatti",
    version,
    disable_help_subcommand = false,
    max_term_width = 100,
    after_help = "Exit codes: 0 done; 1 failed; 2 wrong usage; 4 not allowed; 5 not found. `exec`, `run` and `job wait` exit with the command's code; 124 timed out, 125 bhatti failed, 126 not executable, 127 not found, 128+N ended by signal N."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build the kernel and the images
    Setup(setup::Setup),
    /// Run the daemon
    Serve(serve::Serve),
    /// Run a command in a new sandbox, and destroy the sandbox
    Run(run::Run),
    /// Create a sandbox and wait until it is ready
    Create(create::Create),
    /// List sandboxes
    #[command(visible_alias = "ls")]
    List(list::List),
    /// Show one sandbox
    #[command(visible_alias = "info")]
    Inspect(inspect::Inspect),
    /// Run a command in a sandbox
    Exec(exec::Exec),
    /// Open a terminal in a sandbox, or reattach to one
    #[command(visible_alias = "sh")]
    Shell(shell::Shell),
    /// List sandboxes, as `list` does
    Ps(ps::Ps),
    /// List the jobs and terminals of a sandbox
    Jobs(jobs::Jobs),
    /// Manage jobs: print their output, wait for them, kill them
    #[command(subcommand)]
    Job(jobs::Job),
    /// Kill terminals or jobs of a sandbox
    #[command(hide = true)]
    Kill(kill::Kill),
    /// Print the output of a job
    #[command(hide = true)]
    Logs(logs::Logs),
    /// Wait until a job ends, and exit with its exit code
    #[command(hide = true)]
    Wait(wait::Wait),
    /// Change a sandbox's name, labels, or whether it stays hot
    Edit(edit::Edit),
    /// Pause sandboxes until their next use (their memory is kept)
    Pause(lifecycle::Pause),
    /// Resume sandboxes that are paused or saved
    Resume(lifecycle::Resume),
    /// Stop sandboxes, and save their memory and processes (containers lose them)
    Stop(lifecycle::Stop),
    /// Start stopped sandboxes from their saved state
    Start(lifecycle::Start),
    /// Fork a running sandbox: its memory, its processes and its disk
    Fork(fork::Fork),
    /// Destroy sandboxes
    #[command(visible_alias = "rm")]
    Destroy(destroy::Destroy),
    /// Copy files and directories into a sandbox, or out of it
    Cp(file::Cp),
    /// Read and write files of sandboxes
    File(file::File),
    /// Manage snapshots: save a sandbox under a name, create sandboxes from it
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    /// Manage volumes: file systems that outlive sandboxes
    #[command(subcommand)]
    Volume(volume::Volume),
    /// Manage secrets: environment variables whose values are never shown again
    #[command(subcommand)]
    Secret(secret::Secret),
    /// Manage templates: saved options for new sandboxes
    #[command(subcommand)]
    Template(template::Template),
    /// Manage images: root file systems that sandboxes start from
    #[command(subcommand)]
    Image(image::Image),
    /// Publish a port of a sandbox at a URL that needs no API key
    Publish(publish::Publish),
    /// Unpublish a port of a sandbox
    Unpublish(publish::Unpublish),
    /// List the ports that sandboxes listen on
    Ports(ports::Ports),
    /// Forward a local port to a port of a sandbox, until interrupted
    Forward(forward::Forward),
    /// Save a remote daemon and its API key, and call it from now on
    Login(login::Login),
    /// Choose which daemon to call
    #[command(subcommand)]
    Context(login::ContextCommand),
    /// Manage API keys
    #[command(subcommand)]
    Key(key::Key),
    /// Manage the daemon's users
    #[command(subcommand)]
    User(user::User),
    /// List past events, or follow new ones
    Events(events::Events),
    /// Print the daemon's metrics in Prometheus text format
    #[command(after_help = "Example:\n  bhatti metrics | grep bhatti_http")]
    Metrics,
    /// Check this machine, and print how to fix what is missing
    #[command(after_help = "Example:\n  bhatti doctor")]
    Doctor,
    /// Measure how fast sandboxes are created and used
    Bench(bench::Bench),
    /// Write the manual pages
    #[command(hide = true)]
    Man(man::Man),
    /// Print a completion script for a shell
    Completion(completion::Completion),
    /// Print the version
    #[command(after_help = "Example:\n  bhatti version --json")]
    Version,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Returns every command without subcommands, with the words that invoke it.
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
    fn every_command_has_an_example_that_parses() {
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
    fn help_matches_the_snapshot() {
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
