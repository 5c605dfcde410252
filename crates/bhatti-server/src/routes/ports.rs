//! `/sandboxes/{sandbox}/ports` and `/ports`: listening ports in guests.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use bhatti_agent::{AgentClient, CallError, ReadOptions};
use bhatti_api::Port;
use bhatti_store::SandboxFilter;
use bhatti_types::{SandboxId, Thermal};
use tokio::time::timeout;

use crate::AppState;
use crate::auth::Caller;
use crate::extract::ApiPath;
use crate::page::{Page, PageQuery, Paging};
use crate::status::ApiError;

/// The kernel's tables of TCP sockets.
const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];

/// Maximum number of bytes that are read from a table: a guest may put anything there.
const TABLE_BYTES_MAX: usize = 4 << 20;

/// Time limit for each guest when all guests are asked.
const GUEST_LIMIT: Duration = Duration::from_secs(2);

/// State of a listening socket in these tables.
const LISTEN: &str = "0A";

/// Lists the TCP ports that listen in a sandbox.
#[utoipa::path(get, path = "/sandboxes/{sandbox}/ports", tag = "ports", params(PageQuery, ("sandbox" = String, Path)),
    responses((status = 200, body = Vec<Port>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    ApiPath(id_or_name): ApiPath<String>,
    paging: Paging,
) -> Result<Page<Port>, ApiError> {
    let used = state.control.enter(owner, &id_or_name).await?;
    let ports = listening(&used.agent).await?;
    let ports = ports.into_iter().map(|number| port(used.id, number, false)).collect();
    Ok(paging.by_key(ports, place))
}

/// Lists the listening TCP ports of all hot sandboxes of the caller. Wakes no sandbox.
#[utoipa::path(get, operation_id = "list_all", path = "/ports", tag = "ports", params(PageQuery),
    responses((status = 200, body = Vec<Port>), (status = "default", body = bhatti_api::ErrorBody)))]
pub(crate) async fn list_all(
    State(state): State<AppState>,
    Extension(Caller(owner)): Extension<Caller>,
    paging: Paging,
) -> Result<Page<Port>, ApiError> {
    let mut all = Vec::new();
    for row in state.control.list(owner, &SandboxFilter::default())? {
        if state.control.thermal(row.id) != Some(Thermal::Hot) {
            continue;
        }
        // A sandbox that cools, is destroyed or does not respond counts as one without ports.
        let asked = async {
            let used = state.control.enter(owner, &row.id.to_string()).await.ok()?;
            listening(&used.agent).await.ok()
        };
        let ports = timeout(GUEST_LIMIT, asked).await.ok().flatten().unwrap_or_default();
        all.extend(ports.into_iter().map(|number| port(row.id, number, true)));
    }
    all.sort_by_key(place);
    Ok(paging.by_key(all, place))
}

/// Returns the place of a port in a list.
fn place(port: &Port) -> String {
    format!("{}{:05}", port.sandbox_id.as_deref().unwrap_or_default(), port.container_port)
}

async fn listening(agent: &AgentClient) -> Result<BTreeSet<u16>, CallError> {
    let mut ports = BTreeSet::new();
    for table in TABLES {
        match agent.read_file(table, ReadOptions::default()).await {
            Ok(content) => {
                let text = content.read_to_end(TABLE_BYTES_MAX).await?;
                ports.extend(parse(&String::from_utf8_lossy(&text)));
            }
            // A guest without IPv6 has no IPv6 table.
            Err(CallError::Agent(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ports)
}

/// Returns the ports of listening sockets. The second column is `ADDRESS:PORT` in hexadecimal,
/// the fourth the state.
fn parse(table: &str) -> impl Iterator<Item = u16> {
    table.lines().skip(1).filter_map(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let local = columns.next()?;
        let state = columns.nth(1)?;
        let (_, port) = local.rsplit_once(':')?;
        (state == LISTEN).then(|| u16::from_str_radix(port, 16).ok()).flatten()
    })
}

fn port(sandbox: SandboxId, number: u16, with_id: bool) -> Port {
    Port {
        container_port: number,
        proxy_url: format!("/sandboxes/{sandbox}/proxy/{number}/"),
        sandbox_id: with_id.then(|| sandbox.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_found() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0016 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0 0
   nonsense
";

        assert_eq!(parse(table).collect::<Vec<_>>(), [8080, 80]);
    }
}
