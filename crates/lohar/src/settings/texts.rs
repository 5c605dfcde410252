//! Files in `/etc` of which the agent owns some lines, and users own the rest.

/// Returns `/etc/hosts` with the host name `name` in place of `before`. The agent owns that one
/// word, in the line of `127.0.0.1` that has `localhost`, and adds missing lines. Everything else
/// stays.
pub(super) fn hosts(text: &str, before: &str, name: &str) -> String {
    let is_of = |line: &&str, address: &str| words(line).next() == Some(address);
    let own = text
        .lines()
        .position(|line| is_of(&line, "127.0.0.1") && words(line).any(|word| word == "localhost"));
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    match own {
        Some(at) => lines[at] = renamed(&lines[at], before, name),
        None => lines.insert(0, format!("127.0.0.1 localhost {name}")),
    }
    if !text.lines().any(|line| is_of(&line, "::1")) {
        lines.push("::1 localhost".to_owned());
    }
    lines.join("\n") + "\n"
}

/// The words of a line, without its comment.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split('#').next().unwrap_or_default().split_ascii_whitespace()
}

/// Returns a line of hosts with `name` in place of `before`, or with `name` added if `before` is
/// not there.
fn renamed(line: &str, before: &str, name: &str) -> String {
    if words(line).any(|word| word == name) {
        return line.to_owned();
    }
    let (entry, comment) = match line.split_once('#') {
        Some((entry, comment)) => (entry.trim_end(), format!(" #{comment}")),
        None => (line.trim_end(), String::new()),
    };
    let is_before = |word: &str| word == before && word != "localhost";
    if !words(entry).any(is_before) {
        return format!("{entry} {name}{comment}");
    }
    let replace = |word| if is_before(word) { name } else { word };
    entry.split_ascii_whitespace().map(replace).collect::<Vec<_>>().join(" ") + &comment
}

/// Returns `/etc/resolv.conf` with these name servers in place of its old ones.
pub(super) fn resolvers(text: &str, servers: &[String]) -> String {
    let servers = servers.iter().map(|server| format!("nameserver {server}\n"));
    let others = text.lines().filter(|line| words(line).next() != Some("nameserver"));
    servers.chain(others.map(|line| format!("{line}\n"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_get_the_name_and_keep_lines_of_users() {
        let fresh = "127.0.0.1 localhost one\n::1 localhost\n";
        assert_eq!(hosts("", "", "one"), fresh);
        assert_eq!(hosts(fresh, "one", "one"), fresh);

        let edited = "127.0.0.1 localhost one alias # mine\n10.0.0.5 db\n\n::1 localhost ip6\n";
        assert_eq!(hosts(edited, "one", "two"), edited.replace("one", "two"));

        let without = "10.0.0.5 db\n127.0.0.1 app\n";
        let expected = "127.0.0.1 localhost two\n10.0.0.5 db\n127.0.0.1 app\n::1 localhost\n";
        assert_eq!(hosts(without, "one", "two"), expected);
        assert_eq!(hosts(expected, "two", "three"), expected.replace("two", "three"));
    }

    #[test]
    fn guest_that_is_called_localhost_keeps_that_word() {
        let renamed = hosts("127.0.0.1 localhost\n::1 localhost\n", "localhost", "dev");
        assert_eq!(renamed, "127.0.0.1 localhost dev\n::1 localhost\n");
    }

    #[test]
    fn resolvers_are_replaced_and_other_lines_stay() {
        let servers = ["10.0.0.1".to_owned(), "10.0.0.2".to_owned()];
        let text = "# mine\nsearch corp.test\nnameserver 9.9.9.9\noptions ndots:2\n";

        let expected =
            "nameserver 10.0.0.1\nnameserver 10.0.0.2\n# mine\nsearch corp.test\noptions ndots:2\n";
        assert_eq!(resolvers(text, &servers), expected);
        assert_eq!(resolvers(&resolvers(text, &servers), &servers), expected);
    }
}
