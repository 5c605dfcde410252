//! `bhatti shell` as a user runs it, in a terminal that tmux provides.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::Duration;

use bhatti_testkit::{LIMIT, TestDaemon, kill_process};
use tokio::time::{Instant, sleep};

/// A terminal of 80 columns and 24 rows that runs a shell on the host.
struct Terminal {
    directory: tempfile::TempDir,
}

impl Terminal {
    async fn open() -> Self {
        let terminal = Self { directory: tempfile::tempdir().unwrap() };
        // A prompt that differs from every prompt of a guest.
        let shell = "env -i PATH=/usr/bin:/bin TERM=screen PS1='HERE$ ' sh";
        terminal.tmux(&["new-session", "-d", "-x", "80", "-y", "24", shell]).await;
        terminal.shows("HERE$").await;
        terminal
    }

    async fn tmux(&self, arguments: &[&str]) -> String {
        let output = bhatti_host::process::command("tmux")
            .arg("-S")
            .arg(self.directory.path().join("socket"))
            .args(["-f", "/dev/null", "-u"])
            .args(arguments)
            .env("TERM", "xterm-256color")
            .output()
            .await
            .unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Types a line.
    async fn enter(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]).await;
        self.tmux(&["send-keys", "Enter"]).await;
    }

    async fn press(&self, key: &str) {
        self.tmux(&["send-keys", key]).await;
    }

    /// Returns all lines of the screen, each after a line feed.
    async fn screen(&self) -> String {
        format!("\n{}", self.tmux(&["capture-pane", "-p"]).await)
    }

    /// Waits until the screen shows `text`.
    async fn shows(&self, text: &str) {
        let began = Instant::now();
        loop {
            let screen = self.screen().await;
            if screen.contains(text) {
                return;
            }
            assert!(began.elapsed() < LIMIT, "no `{text}` on the screen:\n{screen}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Clears the screen and waits until it shows only the host's prompt, so that a command's
    /// output is not mistaken for the output of the next command.
    async fn clear(&self) {
        self.enter("clear").await;
        let began = Instant::now();
        loop {
            let screen = self.screen().await;
            if screen.trim() == "HERE$" {
                return;
            }
            assert!(began.elapsed() < LIMIT, "the screen was not cleared:\n{screen}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns the last line that is not empty.
    async fn last_line(&self) -> String {
        self.screen().await.lines().rfind(|line| !line.is_empty()).unwrap_or_default().to_owned()
    }

    /// Checks with the host's shell that the terminal is not left raw or without echo.
    async fn is_as_it_was(&self) {
        self.enter("stty -a | grep -c -e '-echo ' -e '-icanon'; echo checked").await;
        self.shows("\nchecked").await;
        let screen = self.screen().await;
        assert!(screen.contains("\n0\nchecked"), "the terminal was left raw:\n{screen}");
        self.clear().await;
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let socket = self.directory.path().join("socket");
        #[expect(
            clippy::disallowed_methods,
            reason = "a destructor cannot wait for another runtime"
        )]
        let killed =
            std::process::Command::new("tmux").arg("-S").arg(socket).arg("kill-server").output();
        drop(killed);
    }
}

fn command(daemon: &TestDaemon, rest: &str) -> String {
    let program = bhatti_testkit::dist("bhatti");
    format!("{} --data-dir {} {rest}", program.display(), daemon.data_dir().display())
}

async fn create(daemon: &TestDaemon) {
    assert!(daemon.cli(&["create", "--name", "dev"]).status().await.unwrap().success());
}

#[tokio::test]
async fn terminal_is_used_resized_detached_and_reattached() {
    let daemon = TestDaemon::start().await;
    create(&daemon).await;
    let terminal = Terminal::open().await;

    terminal.enter(&command(&daemon, "shell dev")).await;
    terminal.shows("user@dev").await;
    terminal.enter("clear; echo $((6*7)); stty size").await;
    terminal.shows("42\n24 80").await;
    terminal.tmux(&["resize-window", "-x", "100", "-y", "30"]).await;
    terminal.enter("clear; stty size").await;
    terminal.shows("30 100").await;
    // Ctrl+C goes to the guest. The program that shall get it says that it runs: an interrupt
    // between the shell's own output and the start of a program can reach neither.
    terminal.enter("clear; sh -c 'echo asleep; exec sleep 1000'").await;
    terminal.shows("\nasleep").await;
    terminal.press("C-c").await;
    terminal.enter("echo interrupted: $?").await;
    terminal.shows("interrupted: 130").await;

    terminal.enter("clear; (sleep 1; echo written meanwhile) & echo before").await;
    terminal.shows("\nbefore").await;
    terminal.press("C-\\").await;
    terminal.shows("detached; reattach with: bhatti shell dev --attach s1").await;
    terminal.clear().await;
    terminal.is_as_it_was().await;

    terminal.enter(&command(&daemon, "shell dev --attach s1")).await;
    terminal.shows("written meanwhile").await;
    terminal.shows("\nbefore").await;
    terminal.enter("clear; exit 7").await;
    terminal.shows("HERE$").await;
    terminal.enter("echo code: $?").await;
    terminal.shows("code: 7").await;
    terminal.is_as_it_was().await;
}

#[tokio::test]
async fn terminal_is_restored_however_the_shell_ends() {
    let mut daemon = TestDaemon::start().await;
    create(&daemon).await;
    let terminal = Terminal::open().await;
    let open = async |terminal: &Terminal, daemon: &TestDaemon| {
        terminal.enter(&command(daemon, "shell dev")).await;
        terminal.shows("@dev").await;
        assert!(!terminal.last_line().await.contains("HERE$"));
    };

    open(&terminal, &daemon).await;
    terminal.enter("clear; echo there").await;
    terminal.shows("\nthere").await;
    let ended = bhatti_host::process::command("pkill")
        .args(["-TERM", "-f", &format!("^{}", command(&daemon, "shell dev"))])
        .status()
        .await
        .unwrap();
    assert!(ended.success());
    terminal.shows("error: interrupted").await;
    terminal.is_as_it_was().await;

    // If the daemon dies, the connection ends and the session stays.
    open(&terminal, &daemon).await;
    terminal.enter("clear; X=kept; echo set").await;
    terminal.shows("\nset").await;
    kill_process(daemon.pid());
    terminal.shows("reattach with: bhatti shell dev --attach").await;
    terminal.is_as_it_was().await;
    daemon.kill().await;
    daemon.serve().await;
    open(&terminal, &daemon).await;
    terminal.enter("clear; echo X is $X").await;
    terminal.shows("X is kept").await;
    terminal.press("C-\\").await;
    terminal.shows("detached; reattach with:").await;

    // The terminal is also restored if the sandbox does not exist.
    terminal.clear().await;
    terminal.enter(&command(&daemon, "shell nobody")).await;
    terminal.shows("error: sandbox `nobody` not found").await;
    terminal.is_as_it_was().await;
}

#[tokio::test]
async fn exec_prompts_and_colors_work_in_a_terminal() {
    let daemon = TestDaemon::start().await;
    create(&daemon).await;
    let terminal = Terminal::open().await;

    let asks = "exec -it dev -- sh -c 'test -t 0 && test -t 1 && echo a terminal; read x; echo got $x; exit 4'";
    // Both commands are on one line: a line typed before the first has ended would be its input.
    terminal.enter(&format!("{}; echo code: $?", command(&daemon, asks))).await;
    terminal.shows("\na terminal").await;
    terminal.enter("this").await;
    terminal.shows("got this\ncode: 4").await;

    terminal.clear().await;
    terminal.enter(&command(&daemon, "secret set KEY")).await;
    terminal.shows("(hidden)").await;
    terminal.enter("hidden-value").await;
    terminal.shows("set KEY").await;
    assert!(!terminal.screen().await.contains("hidden-value"));
    terminal.is_as_it_was().await;

    terminal.enter(&command(&daemon, "destroy dev")).await;
    terminal.shows("[y/N]").await;
    terminal.enter("n").await;
    terminal.shows("error: did not destroy dev").await;
    terminal.clear().await;
    terminal.enter(&command(&daemon, "list")).await;
    terminal.shows("running (hot)").await;
    assert!(
        terminal.tmux(&["capture-pane", "-p", "-e"]).await.contains("\x1b[32mrunning (hot)"),
        "no colors in a terminal"
    );
    terminal.clear().await;
    terminal.enter(&format!("NO_COLOR=1 {}", command(&daemon, "list"))).await;
    terminal.shows("running (hot)").await;
    assert!(!terminal.tmux(&["capture-pane", "-p", "-e"]).await.contains("\x1b[32m"));
    terminal.clear().await;
    terminal.enter(&command(&daemon, "destroy dev")).await;
    terminal.shows("[y/N]").await;
    terminal.enter("y").await;
    terminal.shows("destroyed dev").await;
}
