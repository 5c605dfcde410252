//! The steps of a request, as the step builder knows them.
//!
//! The builder knows less: it copies as one user, and makes no users. So a step of a request can
//! become several, of which some are scripts that run as root.

use std::collections::BTreeMap;

use bhatti_control::Step;
use serde::Deserialize;

use crate::Error;

/// The user and the directory that a build from an image begins with.
pub(crate) const USER: &str = "user";
pub(crate) const HOME: &str = "/home/user";

/// The shell of the steps.
pub(crate) const SHELL: [&str; 3] = ["/bin/bash", "-l", "-c"];

/// The user of scripts.
const ROOT: &str = "root";

/// Where files are put before they are copied.
const ARRIVED: &str = "/var/tmp/.bhatti-copy";

/// Prepares an image for E2B's SDKs: the user `user`, and directories that all may write.
const PREPARE: &str = r#"# prepare the image: the user `user`
set -e
if ! id -u user >/dev/null 2>&1; then
    if command -v useradd >/dev/null; then
        useradd --create-home --shell /bin/bash --user-group user
    else
        adduser -D -s /bin/bash user
    fi
fi
if command -v sudo >/dev/null; then
    mkdir -p /etc/sudoers.d
    echo 'user ALL=(ALL) NOPASSWD:ALL' >/etc/sudoers.d/user
    chmod 0440 /etc/sudoers.d/user
else
    echo 'this image has no sudo: install it in a step that runs as root if you need it'
fi
mkdir -p /home/user /code /usr/local
chown user: /home/user
chmod 777 /code /usr/local
"#;

/// Makes a directory, and its parents, for an owner.
const MAKE_DIRECTORY: &str = r#"make_directory() {
    [ -d "$1" ] && return
    top=$1
    while parent=$(dirname "$top"); [ ! -e "$parent" ]; do top=$parent; done
    mkdir -p "$1" && chown -R "$2" "$top"
}
"#;

/// A step of a request.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct WireStep {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) args: Vec<String>,
    pub(crate) files_hash: Option<String>,
    pub(crate) force: Option<bool>,
}

/// Steps for the builder.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    pub(crate) all: Vec<Step>,
    /// The step of the request, from 1 on, or the name of a phase, for each of `all`.
    pub(crate) of: Vec<String>,
    /// The hashes of the files that are copied.
    pub(crate) files: Vec<String>,
    user: String,
    workdir: String,
}

impl Steps {
    /// Translates the steps of a request that begins with an image.
    pub(crate) fn from_image(steps: &[WireStep]) -> Result<Self, Error> {
        let mut own = Self { user: USER.to_owned(), workdir: HOME.to_owned(), ..Self::default() };
        own.add("base", run_as_root(PREPARE.to_owned()));
        own.add("base", Step::User(USER.to_owned()));
        own.add("base", Step::Workdir(HOME.to_owned()));
        own.translate(steps)
    }

    /// Translates the steps of a request that begins with a template, which ended with this user
    /// and in this directory.
    pub(crate) fn from_template(
        steps: &[WireStep],
        user: &str,
        workdir: &str,
    ) -> Result<Self, Error> {
        let or = |text: &str, usual: &str| if text.is_empty() { usual } else { text }.to_owned();
        let (user, workdir) = (or(user, USER), or(workdir, HOME));
        Self { user, workdir, ..Self::default() }.translate(steps)
    }

    fn translate(mut self, steps: &[WireStep]) -> Result<Self, Error> {
        for (number, step) in (1..).zip(steps) {
            let invalid = |problem: String| Error::bad_request(format!("step {number}: {problem}"));
            self.add_step(&number.to_string(), step).map_err(invalid)?;
        }
        Ok(self)
    }

    fn add(&mut self, of: &str, step: Step) {
        self.all.push(step);
        self.of.push(of.to_owned());
    }

    fn add_step(&mut self, of: &str, step: &WireStep) -> Result<(), String> {
        let WireStep { kind, args, files_hash, .. } = step;
        let arg = |place: usize| args.get(place).map(String::as_str).filter(|arg| !arg.is_empty());
        let wanted = |place: usize| {
            arg(place).ok_or_else(|| format!("{kind} needs more than {} arguments", args.len()))
        };
        match kind.as_str() {
            "RUN" => {
                let user = arg(1).map(str::to_owned);
                self.add(of, Step::Run { command: wanted(0)?.to_owned(), user });
            }
            "ENV" => {
                let mut variables = BTreeMap::new();
                for pair in args.chunks(2) {
                    let [name, value] = pair else {
                        return Err(format!("ENV has no value for `{}`", pair[0]));
                    };
                    variables.insert(name.clone(), value.clone());
                }
                self.add(of, Step::ExpandedEnv(variables));
            }
            "WORKDIR" => {
                let path = self.absolute(wanted(0)?);
                let (quoted, owner) = (quote(&path), quote(&self.user));
                let title = one_line(&path);
                let script =
                    format!("# WORKDIR {title}\n{MAKE_DIRECTORY}make_directory {quoted} {owner}\n");
                self.add(of, run_as_root(script));
                self.add(of, Step::Workdir(path.clone()));
                self.workdir = path;
            }
            "USER" => {
                let user = wanted(0)?;
                let name = quote(user.split(':').next().unwrap_or_default());
                let script = format!(
                    "# USER {title}\nid -u {name} >/dev/null 2>&1 \\
    || useradd --create-home --shell /bin/bash {name} || adduser -D -s /bin/bash {name}\n",
                    title = one_line(user),
                );
                self.add(of, run_as_root(script));
                self.add(of, Step::User(user.to_owned()));
                user.clone_into(&mut self.user);
            }
            "COPY" => {
                let hash = files_hash.as_deref().ok_or("COPY has no `filesHash`")?;
                if !is_hash(hash) {
                    return Err(format!("invalid filesHash {hash:?}"));
                }
                let owner = arg(2).unwrap_or(&self.user).to_owned();
                self.copy(of, hash, (wanted(0)?, wanted(1)?), (&owner, arg(3)))?;
            }
            other => return Err(format!("unknown type {other:?}")),
        }
        Ok(())
    }

    /// Copies files as root, gives them their owner and mode, and puts them in their place.
    fn copy(
        &mut self,
        of: &str,
        hash: &str,
        (from, to): (&str, &str),
        (owner, mode): (&str, Option<&str>),
    ) -> Result<(), String> {
        if let Some(mode) = mode
            && !mode.bytes().all(|digit| matches!(digit, b'0'..=b'7'))
        {
            return Err(format!("invalid mode {mode:?}: it has octal digits"));
        }
        if !self.files.iter().any(|known| known == hash) {
            self.files.push(hash.to_owned());
        }
        let target = self.absolute(to);
        let is_directory = to.ends_with('/') || [".", ".."].contains(&to) || to.ends_with("/.");
        let source = format!("{ARRIVED}/{}", source(from));
        let chmod = mode.map(|mode| format!("chmod -R {mode} \"$source\"\n")).unwrap_or_default();
        let script = format!(
            r#"# COPY {from} {to}
set -e
{MAKE_DIRECTORY}source={source} target={target} owner={owner}
chown -R -h "$owner" "$source"
{chmod}if [ -d "$source" ]; then
    make_directory "$target" "$owner"
    cp -a "$source/." "$target/"
elif [ -d "$target" ] || {is_directory}; then
    make_directory "$target" "$owner"
    cp -a "$source" "$target/"
else
    make_directory "$(dirname "$target")" "$owner"
    cp -a "$source" "$target"
fi
rm -rf {ARRIVED}
"#,
            from = one_line(from),
            to = one_line(to),
            source = quote(&source),
            target = quote(&target),
            owner = quote(owner),
        );
        self.add(of, Step::Copy { from: hash.to_owned(), to: ARRIVED.to_owned(), user: None });
        self.add(of, run_as_root(script));
        Ok(())
    }

    /// Returns a path below the working directory so far.
    fn absolute(&self, path: &str) -> String {
        let path = match path.strip_prefix("~/") {
            Some(below) if self.user == ROOT => format!("/root/{below}"),
            Some(below) => format!("/home/{}/{below}", self.user),
            None => path.to_owned(),
        };
        let whole = if path.starts_with('/') { path } else { format!("{}/{path}", self.workdir) };
        let mut parts: Vec<&str> = Vec::new();
        for part in whole.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        format!("/{}", parts.join("/"))
    }
}

fn run_as_root(command: String) -> Step {
    Step::Run { command, user: Some(ROOT.to_owned()) }
}

/// Whether a text is a SHA-256 in hexadecimal.
pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns the path of what is copied, within the archive: the source, or the directory before the
/// first part with a pattern. SDKs resolve patterns themselves.
fn source(from: &str) -> String {
    let parts = from.split('/').filter(|part| !matches!(*part, "" | "."));
    let plain = parts.take_while(|part| !part.contains(['*', '?', '[', '{', '!']));
    plain.collect::<Vec<_>>().join("/")
}

/// Quotes a text for a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Returns the text without line ends, for a comment.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn step(kind: &str, args: &[&str]) -> WireStep {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let files_hash = (kind == "COPY").then(|| HASH.to_owned());
        WireStep { kind: kind.to_owned(), args, files_hash, force: None }
    }

    fn script(step: &Step) -> &str {
        match step {
            Step::Run { command, user } => {
                assert_eq!(user.as_deref(), Some("root"));
                command
            }
            step => panic!("{step:?}"),
        }
    }

    #[test]
    fn steps_keep_the_numbers_of_the_request() {
        let wire = [
            step("RUN", &["make", "root"]),
            step("ENV", &["A", "1", "PATH", "/x:$PATH"]),
            step("USER", &["app"]),
            step("WORKDIR", &["src"]),
            step("COPY", &["*.py", ".", "", ""]),
        ];

        let steps = Steps::from_image(&wire).unwrap();

        assert_eq!(steps.of, ["base", "base", "base", "1", "2", "3", "3", "4", "4", "5", "5"]);
        let run = Step::Run { command: "make".to_owned(), user: Some("root".to_owned()) };
        assert_eq!(steps.all[3], run);
        assert_eq!(steps.all[8], Step::Workdir("/home/user/src".to_owned()));
        assert!(script(&steps.all[7]).contains("make_directory '/home/user/src' 'app'"));
        assert_eq!(steps.files, [HASH]);
        let copy = script(&steps.all[10]);
        assert!(copy.contains("target='/home/user/src' owner='app'"), "{copy}");
        assert!(copy.contains("source='/var/tmp/.bhatti-copy/'"), "{copy}");
    }

    #[test]
    fn template_goes_on_where_its_base_has_ended() {
        let wire = [step("WORKDIR", &["../b"])];
        let steps = Steps::from_template(&wire, "app", "/srv/a").unwrap();
        assert_eq!(steps.all[1], Step::Workdir("/srv/b".to_owned()));
    }

    #[test]
    fn malformed_steps_are_refused_with_their_number() {
        for (wrong, problem) in [
            (step("RUN", &[]), "needs more than 0"),
            (step("RUN", &[""]), "needs more than 1"),
            (step("ENV", &["A"]), "no value for `A`"),
            (step("COPY", &["a", "b", "", "9"]), "invalid mode"),
            (WireStep { files_hash: None, ..step("COPY", &["a", "b"]) }, "filesHash"),
            (
                WireStep { files_hash: Some("../x".into()), ..step("COPY", &["a", "b"]) },
                "filesHash",
            ),
            (step("run", &["a"]), "unknown type"),
        ] {
            let error = Steps::from_image(&[step("RUN", &["a"]), wrong]).unwrap_err();
            let message = error.json()["message"].as_str().unwrap().to_owned();
            assert!(message.starts_with("step 2: ") && message.contains(problem), "{message}");
        }
    }

    #[test]
    fn texts_of_users_stay_texts_in_scripts() {
        let from = "a'; rm -rf /\n'";
        let steps = Steps::from_image(&[step("COPY", &[from, "b", "x'y", ""])]).unwrap();
        let copy = script(steps.all.last().unwrap());
        assert!(copy.starts_with("# COPY a'; rm -rf / ' b\n"), "{copy}");
        assert!(copy.contains(r"owner='x'\''y'"), "{copy}");
        for kind in ["WORKDIR", "USER"] {
            let steps = Steps::from_image(&[step(kind, &["/a\ntouch /tmp/x"])]).unwrap();
            let script = script(&steps.all[3]);
            assert!(!script.contains("\ntouch /tmp/x\n"), "{script}");
        }
    }
}
