//! `bhatti image build`: from a Dockerfile, or from Debian packages.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bhatti_api::BuildImage;
use bhatti_image::{ImageStore, build_image};
use bhatti_types::ImageName;
use clap::Args;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::Context;
use super::build_work::{follow_log, send_directory};
use super::image_pull::PullPolicy;
use super::setup::progress::with_progress;
use crate::error::CliError;
use crate::options::parse_variable;
use crate::output::bytes;
use crate::paths;

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// Name of the image; an image of yours with that name is replaced
    #[arg(short, long, value_name = "NAME")]
    tag: String,
    /// Directory whose files the steps can copy
    #[arg(value_name = "CONTEXT", required_unless_present = "package")]
    directory: Option<PathBuf>,
    /// Dockerfile, or `-` for standard input [default: Dockerfile in CONTEXT]
    #[arg(short, long, value_name = "FILE", conflicts_with = "package")]
    file: Option<PathBuf>,
    /// Value of an argument; without a value, that of the environment variable (repeatable)
    #[arg(long, value_name = "NAME[=VALUE]", conflicts_with = "package")]
    build_arg: Vec<String>,
    /// Secret that steps can mount: id=ID,src=FILE or id=ID,env=VARIABLE (repeatable)
    #[arg(long, value_name = "SECRET", conflicts_with = "package")]
    secret: Vec<String>,
    /// Stage to build [default: the last one]
    #[arg(long, value_name = "STAGE", conflicts_with = "package")]
    target: Option<String>,
    /// When to pull the images that the Dockerfile names
    #[arg(long, value_enum, default_value_t, value_name = "POLICY", conflicts_with = "package")]
    pull: PullPolicy,
    /// Run all steps, also those whose results are in the cache
    #[arg(long, conflicts_with = "package")]
    no_cache: bool,
    /// vCPUs of the build's sandbox [default: 2]
    #[arg(long, value_name = "NUMBER", conflicts_with = "package")]
    cpus: Option<u64>,
    /// Memory of the build's sandbox, in MiB [default: 2048]
    #[arg(long, value_name = "MIB", conflicts_with = "package")]
    memory: Option<u64>,
    /// Network of the build's sandbox: `nat` or `none` [default: the daemon's default]
    #[arg(long, value_name = "MODE", conflicts_with = "package")]
    network: Option<String>,
    /// Instead of a Dockerfile: Debian package to add to the image `minimal`, on the daemon's
    /// machine (repeatable)
    #[arg(short, long, value_name = "PACKAGE", conflicts_with = "directory")]
    package: Vec<String>,
}

pub(crate) async fn run(context: &Context, arguments: Build) -> Result<(), CliError> {
    match arguments.directory.clone() {
        Some(directory) => build(context, arguments, &directory).await,
        None => of_packages(context, &arguments.tag, &arguments.package).await,
    }
}

async fn of_packages(context: &Context, name: &str, packages: &[String]) -> Result<(), CliError> {
    let name: ImageName = name.parse().map_err(|error| CliError::of(&error))?;
    paths::create_data_dir(&context.data_dir)?;
    let store = ImageStore::new(&context.data_dir);
    let built = with_progress(context.output, async |progress| {
        build_image(&store, &name, packages, progress).await
    });
    built.await.map_err(|error| CliError::of(&error))?;
    context.output.show(&serde_json::json!({ "image": name.as_str() }), |_| {
        format!("ready: bhatti create --image {name}")
    })
}

async fn build(context: &Context, arguments: Build, directory: &Path) -> Result<(), CliError> {
    if !directory.is_dir() {
        let shown = directory.display();
        return Err(CliError::new(format!("`{shown}` is not a directory"))
            .hint("name the directory whose files the steps can copy"));
    }
    let file = arguments.file.unwrap_or_else(|| directory.join("Dockerfile"));
    let request = BuildImage {
        name: arguments.tag,
        dockerfile: read_dockerfile(&file)?,
        args: arguments.build_arg.iter().filter_map(|text| argument(text)).collect(),
        secrets: arguments.secret.iter().map(|text| secret(text)).collect::<Result<_, _>>()?,
        target: arguments.target,
        pull: Some(arguments.pull.as_str().to_owned()),
        no_cache: arguments.no_cache,
        cpus: arguments.cpus,
        memory_mb: arguments.memory,
        network: arguments.network,
    };
    let ignored = Ignored::of(directory, &file)?;
    let wanted = move |path: &Path, is_directory| ignored.wants(path, is_directory);
    let client = &context.client;
    let begin = async |archive| client.build_image(&request, archive).await;
    let operation = send_directory(context, directory, wanted, begin).await?;
    let operation = follow_log(context, operation).await?;
    let image = client.inspect_image(&operation.image).await?;
    context.output.show(&image, |image| {
        let (name, size) = (&image.name, bytes(image.disk_bytes));
        format!("built {name} ({size} on disk): bhatti create --image {name}")
    })
}

fn read_dockerfile(file: &Path) -> Result<String, CliError> {
    if file.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(file).map_err(|error| {
        CliError::new(format!("failed to read `{}`: {error}", file.display()))
            .hint("name the Dockerfile with -f FILE")
    })
}

/// Returns an argument and its value. One that is not given and not in the environment has none.
fn argument(text: &str) -> Option<(String, String)> {
    match parse_variable(text) {
        Ok(pair) => Some(pair),
        Err(_) => Some((text.to_owned(), std::env::var(text).ok()?)),
    }
}

/// Reads a secret, as `docker build --secret` takes it.
fn secret(text: &str) -> Result<(String, String), CliError> {
    let parts: BTreeMap<&str, &str> =
        text.split(',').filter_map(|part| part.split_once('=')).collect();
    let failed = |why: String| {
        CliError::new(format!("invalid secret `{text}`: {why}"))
            .hint("write id=ID,src=FILE or id=ID,env=VARIABLE")
    };
    let id = parts.get("id").ok_or_else(|| failed("it has no id".to_owned()))?;
    let file = parts.get("src").or_else(|| parts.get("source"));
    let value = match (file, parts.get("env")) {
        (Some(file), None) => {
            std::fs::read_to_string(file).map_err(|error| failed(error.to_string()))?
        }
        (None, Some(variable)) => {
            std::env::var(variable).map_err(|error| failed(format!("`{variable}`: {error}")))?
        }
        _ => return Err(failed("it needs either src or env".to_owned())),
    };
    Ok(((*id).to_owned(), value))
}

/// The files of a context that `.dockerignore` leaves out. The builder applies the file again, so
/// this only saves their transfer.
struct Ignored {
    /// Whether the patterns are those of the file in the context.
    is_contexts: bool,
    patterns: Gitignore,
    directory: PathBuf,
}

impl Ignored {
    /// Reads the file beside the Dockerfile that has its name and `.dockerignore`, or the one in
    /// the context.
    fn of(directory: &Path, dockerfile: &Path) -> Result<Self, CliError> {
        let mut own = dockerfile.as_os_str().to_owned();
        own.push(".dockerignore");
        let own = PathBuf::from(own);
        let is_contexts = !own.is_file();
        let file = if is_contexts { directory.join(".dockerignore") } else { own };
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                let shown = file.display();
                return Err(CliError::new(format!("failed to read `{shown}`: {error}")));
            }
        };
        Self::parse(directory, &text)
            .map(|ignored| Self { is_contexts, ..ignored })
            .map_err(|error| CliError::new(format!("invalid `{}`: {error}", file.display())))
    }

    /// Docker's patterns begin at the context's root, those of Git at any directory.
    fn parse(directory: &Path, text: &str) -> Result<Self, ignore::Error> {
        let mut patterns = GitignoreBuilder::new(directory);
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let (sign, pattern) = match line.strip_prefix('!') {
                Some(pattern) => ("!", pattern.trim()),
                None => ("", line),
            };
            let pattern = pattern.trim_start_matches("./").trim_matches('/');
            if !pattern.is_empty() && pattern != "." {
                patterns.add_line(None, &format!("{sign}/{pattern}"))?;
            }
        }
        let (patterns, directory) = (patterns.build()?, directory.to_owned());
        Ok(Self { is_contexts: true, patterns, directory })
    }

    fn wants(&self, path: &Path, is_directory: bool) -> bool {
        let name = path.strip_prefix(&self.directory).unwrap_or(path);
        // The builder would apply it in place of the other one.
        if name == Path::new(".dockerignore") {
            return self.is_contexts;
        }
        // A directory that is left out can have files that are not.
        if is_directory && self.patterns.num_whitelists() > 0 {
            return true;
        }
        !self.patterns.matched_path_or_any_parents(name, is_directory).is_ignore()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_docker() {
        let directory = Path::new("/context");
        let wants = |text: &str, name: &str| {
            Ignored::parse(directory, text).unwrap().wants(&directory.join(name), false)
        };
        let text = "# comment\n\n*.md\n/target/\n**/*.log\n docs \n!docs/keep.txt\n./sub/x\n";
        for (name, expected) in [
            ("README.md", false),
            ("sub/README.md", true),
            ("target/debug/a", false),
            ("sub/target", true),
            ("a.log", false),
            ("sub/deep/a.log", false),
            ("docs/a.txt", false),
            ("docs/keep.txt", true),
            ("sub/x", false),
            ("sub/y", true),
            (".dockerignore", true),
        ] {
            assert_eq!(wants(text, name), expected, "{name}");
        }
        assert!(!wants("*", "a"));
        assert!(wants("*\n!a", "a"));
    }

    #[test]
    fn secrets_come_from_files_and_variables() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "s3cret").unwrap();
        let (id, value) = secret(&format!("id=token,src={}", file.path().display())).unwrap();
        assert_eq!((&*id, &*value), ("token", "s3cret"));
        assert_eq!(secret("type=env,id=home,env=PATH").unwrap().1, std::env::var("PATH").unwrap());
        for text in ["", "id=a", "src=/none", "id=a,src=/none", "id=a,env=NONE_OF_IT"] {
            secret(text).unwrap_err();
        }
    }
}
