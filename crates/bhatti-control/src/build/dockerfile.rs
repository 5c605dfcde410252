//! What a build needs to know of a Dockerfile before it begins: the images to pull, and the line of
//! each step.
//!
//! Source: Docker's Dockerfile reference. Buildah numbers the stages of a file and the steps of a
//! stage from one on; the first step of a stage is its `FROM`.

use std::collections::{BTreeMap, BTreeSet};

use parse_dockerfile::{ArgInstruction, Flag, FromInstruction, Instruction, Stage};

use super::expand::{assignments, expand};
use crate::image_errors::DockerfileError;

/// A Dockerfile as far as a build needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dockerfile {
    /// The images that the wanted stages begin with or copy from: as the file has them, and with
    /// the values of their arguments.
    pub(crate) bases: BTreeMap<String, String>,
    /// The lines of the steps of each stage, from 1 on.
    lines: Vec<Vec<usize>>,
}

/// Maximum number of instructions of a Dockerfile.
const INSTRUCTIONS_MAX: usize = 10_000;

/// Maximum number of stages of a Dockerfile.
const STAGES_MAX: usize = 200;

impl Dockerfile {
    /// Reads a Dockerfile. `arguments` are the values of its arguments. Of several stages, `target`
    /// is built; the last one if absent.
    pub(crate) fn read(
        text: &str,
        arguments: &BTreeMap<String, String>,
        target: Option<&str>,
    ) -> Result<Self, DockerfileError> {
        let file = parse_dockerfile::parse(text)
            .map_err(|error| DockerfileError::Invalid(error.to_string()))?;
        let values = global_arguments(file.global_args(), arguments);
        let stages: Vec<_> = file.stages().collect();
        for (what, count, max) in [
            ("instructions", file.instructions.len(), INSTRUCTIONS_MAX),
            ("stages", stages.len(), STAGES_MAX),
        ] {
            if count > max {
                let problem = format!("{count} {what} are more than {max}");
                return Err(DockerfileError::Invalid(problem));
            }
        }
        let names: Vec<String> = stages.iter().map(|stage| name_of(stage.from)).collect();
        let number = |name: &str| position(&names, name);
        let wanted = match target {
            None => stages.len() - 1,
            Some(target) => {
                number(target).ok_or_else(|| DockerfileError::NoStage(target.to_owned()))?
            }
        };
        let (mut bases, mut seen) = (BTreeMap::new(), BTreeSet::new());
        let mut open = vec![wanted];
        while let Some(stage) = open.pop() {
            if !seen.insert(stage) {
                continue;
            }
            for source in sources(&stages[stage]) {
                // A source that cannot be expanded here is left to the builder.
                let Some(expanded) = expand(&source, &values) else { continue };
                match position(&names[..stage], &expanded) {
                    Some(earlier) => open.push(earlier),
                    None if expanded == "scratch" => {}
                    None => drop(bases.insert(source, expanded)),
                }
            }
        }
        let ends: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
        let lines = stages.iter().map(|stage| lines(&ends, stage)).collect();
        Ok(Self { bases, lines })
    }

    /// Returns the line of a step, from 1 on. Stages and steps count from 1 on, too.
    pub(crate) fn line(&self, stage: usize, step: usize) -> Option<usize> {
        self.lines.get(stage.checked_sub(1)?)?.get(step.checked_sub(1)?).copied()
    }
}

/// Returns the values of the arguments before the first stage.
fn global_arguments<'a, 'b: 'a>(
    defined: impl Iterator<Item = &'a ArgInstruction<'b>>,
    given: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    // Docker's predefined arguments.
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    for kind in ["TARGET", "BUILD"] {
        let platform = format!("linux/{arch}");
        for (name, value) in
            [("PLATFORM", platform.as_str()), ("OS", "linux"), ("ARCH", arch), ("VARIANT", "")]
        {
            values.insert(format!("{kind}{name}"), value.to_owned());
        }
    }
    for argument in defined {
        for (name, default) in assignments(&argument.arguments.value) {
            let default = default.and_then(|text| expand(&text, &values));
            if let Some(value) = given.get(&name).cloned().or(default) {
                values.insert(name, value);
            }
        }
    }
    values
}

/// Returns the name of a stage; empty if it has none. Names have no case.
fn name_of(from: &FromInstruction<'_>) -> String {
    from.as_.as_ref().map(|(_, name)| name.value.to_lowercase()).unwrap_or_default()
}

/// Returns the number of the stage that a name or a number stands for.
fn position(names: &[String], name: &str) -> Option<usize> {
    let lower = name.to_lowercase();
    let by_name = names.iter().rposition(|known| !known.is_empty() && *known == lower);
    by_name.or_else(|| name.parse().ok().filter(|number| *number < names.len()))
}

/// Returns the images and stages that a stage begins with or copies from.
fn sources(stage: &Stage<'_, '_>) -> Vec<String> {
    let mut sources = vec![stage.from.image.value.clone().into_owned()];
    let value = |flags: &[Flag<'_>], name: &str| -> Vec<String> {
        let named = flags.iter().filter(|flag| flag.name.value == name);
        named.filter_map(|flag| Some(flag.value.as_ref()?.value.clone().into_owned())).collect()
    };
    for instruction in stage.instructions {
        match instruction {
            Instruction::Copy(copy) => sources.extend(value(&copy.options, "from")),
            Instruction::Run(run) => {
                for mount in value(&run.options, "mount") {
                    let from = mount.split(',').find_map(|part| part.strip_prefix("from="));
                    sources.extend(from.map(str::to_owned));
                }
            }
            _ => {}
        }
    }
    sources
}

/// Returns the lines of a stage's instructions. `ends` are the places of the line breaks.
fn lines(ends: &[usize], stage: &Stage<'_, '_>) -> Vec<usize> {
    let line = |at: usize| ends.partition_point(|end| *end < at) + 1;
    let starts = stage.instructions.iter().filter_map(start);
    std::iter::once(stage.from.from.span.start).chain(starts).map(line).collect()
}

/// Returns where an instruction begins.
fn start(instruction: &Instruction<'_>) -> Option<usize> {
    let keyword = match instruction {
        Instruction::Add(it) => &it.add,
        Instruction::Arg(it) => &it.arg,
        Instruction::Cmd(it) => &it.cmd,
        Instruction::Copy(it) => &it.copy,
        Instruction::Entrypoint(it) => &it.entrypoint,
        Instruction::Env(it) => &it.env,
        Instruction::Expose(it) => &it.expose,
        Instruction::From(it) => &it.from,
        Instruction::Healthcheck(it) => &it.healthcheck,
        Instruction::Label(it) => &it.label,
        Instruction::Maintainer(it) => &it.maintainer,
        Instruction::Onbuild(it) => &it.onbuild,
        Instruction::Run(it) => &it.run,
        Instruction::Shell(it) => &it.shell,
        Instruction::Stopsignal(it) => &it.stopsignal,
        Instruction::User(it) => &it.user,
        Instruction::Volume(it) => &it.volume,
        Instruction::Workdir(it) => &it.workdir,
        _ => return None,
    };
    Some(keyword.span.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, given: &[(&str, &str)], target: Option<&str>) -> Dockerfile {
        let given = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Dockerfile::read(text, &given.collect(), target).unwrap()
    }

    fn bases(file: &Dockerfile) -> Vec<(&str, &str)> {
        file.bases.iter().map(|(source, image)| (&**source, &**image)).collect()
    }

    const SEVERAL: &str = "# syntax=docker/dockerfile:1
ARG TAG=3.12
ARG IMAGE=\"python:${TAG}-slim\"

FROM ${IMAGE} AS Base
RUN echo one \\
  two
FROM scratch AS none
FROM alpine AS unused
FROM base
COPY --from=base /a /a
COPY --from=0 /a /b
COPY --from=busybox:1 /bin/sh /sh
RUN --mount=type=bind,from=tools@sha256:00,target=/t <<END
FROM is not an instruction here
END
CMD [\"/sh\"]
";

    #[test]
    fn images_of_the_wanted_stages_are_found_with_the_values_of_arguments() {
        let file = read(SEVERAL, &[], None);
        let tools = ("tools@sha256:00", "tools@sha256:00");
        let expected = [("${IMAGE}", "python:3.12-slim"), ("busybox:1", "busybox:1"), tools];
        assert_eq!(bases(&file), expected);

        assert_eq!(
            bases(&read(SEVERAL, &[("TAG", "3.9"), ("OTHER", "x")], Some("base"))),
            [("${IMAGE}", "python:3.9-slim")]
        );
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let of_arch = format!("FROM one AS of-{arch}\nFROM of-${{TARGETARCH}}\n");
        assert_eq!(bases(&read(&of_arch, &[], None)), [("one", "one")]);
        assert_eq!(bases(&read(SEVERAL, &[], Some("none"))), []);
        assert_eq!(bases(&read(SEVERAL, &[], Some("2"))), [("alpine", "alpine")]);
    }

    #[test]
    fn steps_have_the_lines_of_their_instructions() {
        let file = read(SEVERAL, &[], None);
        assert_eq!([1, 2].map(|step| file.line(1, step)), [Some(5), Some(6)]);
        assert_eq!([1, 5, 6].map(|step| file.line(4, step)), [Some(10), Some(14), Some(17)]);
        assert_eq!((file.line(4, 7), file.line(9, 1), file.line(0, 0)), (None, None, None));
    }

    #[test]
    fn invalid_file_and_missing_stage_are_refused() {
        let none = BTreeMap::new();
        let many = format!("FROM x\n{}", "RUN a\n".repeat(20_000));
        for text in ["", "RUN true\n", "FROM\n", "FRUM x\n", &many] {
            let error = Dockerfile::read(text, &none, None).unwrap_err();
            assert!(matches!(error, DockerfileError::Invalid(_)), "{text}: {error}");
        }
        let error = Dockerfile::read("FROM a\n", &none, Some("b")).unwrap_err();
        assert_eq!(error.to_string(), "the Dockerfile has no stage `b`");
    }
}
