//! `bhatti create`.

use bhatti_api::CreateSandbox;
use tokio::time::Instant;

use super::Context;
use crate::cli::Create;
use crate::error::CliError;

pub(super) async fn run(context: &Context, arguments: Create) -> Result<(), CliError> {
    let Create {
        name,
        cpus,
        memory,
        env,
        keep_hot,
        cold_boot,
        network,
        allow_cidr,
        volume,
        new_volume,
    } = arguments;
    let env = env.into_iter().collect();
    let request = CreateSandbox {
        name,
        cpus,
        memory_mb: memory,
        env,
        keep_hot,
        cold_boot,
        network,
        network_allow: allow_cidr,
        volumes: volume,
        new_volumes: new_volume,
        ..CreateSandbox::default()
    };
    let began = Instant::now();
    let sandbox = context.client.create(&request).await?;
    let seconds = began.elapsed().as_secs_f64();
    let terminal = context.output.terminal;
    context.output.show(&sandbox, |sandbox| {
        if terminal {
            format!("created {} ({}) in {seconds:.2} s", sandbox.name, sandbox.id)
        } else {
            format!("{}\t{}", sandbox.id, sandbox.name)
        }
    })
}
