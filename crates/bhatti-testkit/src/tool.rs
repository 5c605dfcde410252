//! Running a program to its end.

pub(crate) fn std_command(program: &str, arguments: &[&str]) -> bool {
    #[expect(clippy::disallowed_methods, reason = "a test's clean-up runs outside any runtime")]
    let status = std::process::Command::new(program).args(arguments).status();
    status.is_ok_and(|status| status.success())
}
