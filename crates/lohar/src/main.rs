//! lohar, the guest agent.
//!
//! ```text
//!  main ─┬─ pid1      brings the guest up, then serves the virtio-serial channel; powers off on request
//!        └─ test mode serves the same protocol on two Unix sockets, without root and without a VM
//!
//!  serve      one connection = one operation
//!  exec       runs a command, its output in frames
//!  forward    relays a connection to a TCP port of the loopback
//!  reaper     the only caller of wait(2)
//! ```
//!
//! Everything runs on one thread: starting a child and registering it with the reaper cannot be torn apart by its exit.

mod channel;
mod connection;
mod exec;
mod forward;
mod log;
mod lookup;
mod pid1;
mod reaper;
mod serve;
mod test_mode;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::var_os("LOHAR_TEST").is_some_and(|value| value == "1") {
        return test_mode::run();
    }
    if std::process::id() == 1 {
        return pid1::run();
    }
    // As an ordinary process it would mount over, kill and power off a machine that is not its own.
    log::line(format_args!(
        "refusing to run: this is not PID 1 of a virtual machine (set LOHAR_TEST=1 for test mode)"
    ));
    ExitCode::FAILURE
}
