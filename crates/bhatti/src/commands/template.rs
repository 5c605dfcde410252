//! `bhatti template`.

use bhatti_api::{CreateTemplate, Template as Listed};
use clap::{Args, Subcommand};

use super::{Context, several};
use crate::error::CliError;
use crate::options::parse_variable;
use crate::output::{Cell, Table, mib};

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Create a template
    Create(Create),
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
            };
            let made = client.create_template(&request).await?;
            output.show_made(&made, (&made.id, &made.name), |made| {
                format!("created template {}", made.name)
            })
        }
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
    facts.extend(template.labels.iter().map(|label| ("label", variable(label))));
    facts.extend(template.secrets.iter().map(|secret| ("secret", secret.into())));
    facts.extend(template.env.iter().map(|pair| ("env", variable(pair))));
    if !template.init.is_empty() {
        facts.push(("init", Cell::from(&template.init)));
    }
    facts
}
