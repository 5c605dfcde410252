//! `bhatti template`.

use std::path::PathBuf;

use bhatti_api::{BuildTemplate, CreateTemplate, Template as Listed};
use bhatti_client::Upload;
use clap::{Args, Subcommand};

use super::build_work::{follow_log, send_directory};
use super::image_pull::PullPolicy;
use super::{Context, several};
use crate::error::CliError;
use crate::options::parse_variable;
use crate::output::{Cell, Table, mib};

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Create a template
    Create(Create),
    /// Build a template from steps, in a sandbox
    Build(Build),
    /// List templates
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti template list")]
    List,
    /// Show one template
    #[command(after_help = "Example:\n  bhatti template inspect web")]
    Inspect {
        /// Name or id of the template
        template: String,
    },
    /// Delete templates (sandboxes created from them stay)
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti template delete web")]
    Delete {
        /// Names or ids of the templates
        #[arg(required = true)]
        templates: Vec<String>,
    },
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bhatti template create web --memory 1024 --env PORT=8080 --secret API_KEY\n  bhatti create --template web"
)]
pub(crate) struct Create {
    /// Name of the template
    name: String,
    /// Image to start from [default: minimal]
    #[arg(long)]
    image: Option<String>,
    /// Number of virtual CPUs [default: 1]
    #[arg(long, value_name = "COUNT")]
    cpus: Option<u64>,
    /// Memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Root disk size in MiB [default: the image's size]
    #[arg(long, value_name = "MIB")]
    disk: Option<u64>,
    /// Environment variable to set (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Secret to expose as an environment variable (repeatable)
    #[arg(long, value_name = "NAME")]
    secret: Vec<String>,
    /// Label to set (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    label: Vec<(String, String)>,
    /// Script to run when a sandbox is ready
    #[arg(long, value_name = "SCRIPT")]
    init: Option<String>,
    /// Let all users create sandboxes from it (only the admin can)
    #[arg(long)]
    public: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example of a file:\n  image: python:3.12-slim\n  steps:\n    - run: pip install flask\n    - copy: {from: app, to: /app}\n    - env: {PORT: \"8000\"}\n    - workdir: /app\n  start: python -m flask run --port $PORT\n  ready: python -c 'import urllib.request as r; r.urlopen(\"http://127.0.0.1:8000\")'\n\nExamples:\n  bhatti template build web template.yaml .\n  bhatti create --template web\n\nOther keys: template (to begin with, in place of an image), user (a step), cpus, memory_mb, disk_mb.\nThe result of each step is cached, so an unchanged step runs once. Sandboxes of the template start\nfrom a snapshot in which the start command runs already."
)]
pub(crate) struct Build {
    /// Name of the template; a template of yours with that name is replaced
    name: String,
    /// File with the steps (YAML or JSON)
    file: PathBuf,
    /// Directory whose files the steps can copy [default: none]
    directory: Option<PathBuf>,
    /// When to pull the image
    #[arg(long, value_enum, default_value_t, value_name = "POLICY")]
    pull: PullPolicy,
    /// Run all steps, also those whose results are in the cache
    #[arg(long)]
    no_cache: bool,
    /// Let all users create sandboxes from it (only the admin can)
    #[arg(long)]
    public: bool,
}

async fn build(context: &Context, arguments: Build) -> Result<(), CliError> {
    let Build { name, file, directory, pull, no_cache, public } = arguments;
    let shown = file.display();
    let text = std::fs::read_to_string(&file)
        .map_err(|error| CliError::new(format!("failed to read `{shown}`: {error}")))?;
    let steps: BuildTemplate = serde_saphyr::from_str(&text)
        .map_err(|error| CliError::new(format!("invalid `{shown}`: {error}")))?;
    let request = BuildTemplate {
        name,
        pull: Some(pull.as_str().to_owned()),
        no_cache: no_cache || steps.no_cache,
        public: public || steps.public,
        ..steps
    };
    let client = &context.client;
    let begin = async |files| client.build_template(&request, files).await;
    let operation = match directory {
        Some(directory) => send_directory(context, &directory, |_, _| true, begin).await?,
        None => begin(Upload::new(tokio::io::empty(), None)).await?,
    };
    let operation = follow_log(context, operation).await?;
    context.output.show(&client.inspect_template(&operation.image).await?, |template| {
        format!("built template {}: bhatti create --template {0}", template.name)
    })
}

const TEMPLATES: Table<Listed> = Table {
    header: &["NAME", "IMAGE", "CPUS", "MEMORY", "CREATED"],
    row: |template| {
        vec![
            template.name.clone().into(),
            template.image.clone().into(),
            Cell::number(template.cpus),
            mib(template.memory_mb).into(),
            Cell::Time(template.created_at.clone()),
        ]
    },
    key: |template| template.name.clone(),
};

pub(crate) async fn run(context: &Context, command: Template) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        Template::Create(arguments) => {
            let request = CreateTemplate {
                name: arguments.name,
                image: arguments.image,
                cpus: arguments.cpus,
                memory_mb: arguments.memory,
                disk_mb: arguments.disk,
                env: arguments.env.into_iter().collect(),
                secrets: arguments.secret,
                labels: arguments.label.into_iter().collect(),
                init: arguments.init,
                public: arguments.public,
            };
            let made = client.create_template(&request).await?;
            output.show_made(&made, (&made.id, &made.name), |made| {
                format!("created template {}", made.name)
            })
        }
        Template::Build(arguments) => build(context, arguments).await,
        Template::List => output.show_list(&client.list_templates().await?, &TEMPLATES),
        Template::Inspect { template } => {
            output.show_facts(&client.inspect_template(&template).await?, describe)
        }
        Template::Delete { templates } => {
            several::delete(context, "template", &templates, async |template| {
                client.delete_template(template).await
            })
            .await
        }
    }
}

fn describe(template: &Listed) -> Vec<(&'static str, Cell)> {
    let variable = |(name, value): (&String, &String)| Cell::from(format!("{name}={value}"));
    let mut facts = vec![
        ("id", Cell::from(&template.id)),
        ("name", Cell::from(&template.name)),
        ("image", Cell::from(&template.image)),
        ("cpus", Cell::number(template.cpus)),
        ("memory", mib(template.memory_mb).into()),
        ("disk", template.disk_mb.map_or("as the image".to_owned(), mib).into()),
        ("created", Cell::Time(template.created_at.clone())),
    ];
    if template.is_warm {
        facts.push(("warm", "starts from a snapshot with running processes".into()));
    }
    if template.public {
        facts.push(("public", "all users can create sandboxes from it".into()));
    }
    facts.extend(template.labels.iter().map(|label| ("label", variable(label))));
    facts.extend(template.secrets.iter().map(|secret| ("secret", secret.into())));
    facts.extend(template.env.iter().map(|pair| ("env", variable(pair))));
    if !template.init.is_empty() {
        facts.push(("init", Cell::from(&template.init)));
    }
    facts
}
