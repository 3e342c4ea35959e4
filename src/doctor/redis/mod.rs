//! Redis: version, persistence, our user's rights, and the state of the stream.

mod consumers;
mod rights;
mod server;
mod stream;

use std::collections::BTreeSet;
use std::time::Instant;

use self::consumers::{consumers, dangling};
use self::rights::may_do_everything;
use self::server::{Info, Settings, eviction, memory, persistence, version};
use self::stream::{dead_letters, missing, stream};
use super::Findings;
use crate::config::Config;
use crate::stream::server as commands;
use crate::stream::{Redis, Stream, StreamError, StreamResult};

/// Maximum number of pending entries to check.
const PENDING_SEEN: usize = 1000;

/// Runs the checks. Returns the number of processes with running pipelines.
pub async fn check(config: &Config, findings: &mut Findings) -> usize {
    let connected = match Redis::open(config) {
        Ok(redis) => redis.connect().await,
        Err(error) => Err(error),
    };
    let mut connection = match connected {
        Ok(connection) => connection,
        Err(error) => {
            let (found, remedy) = explain(&error);
            findings.unreachable(format!("{} {found}", config.redis_url), remedy);
            return 1;
        }
    };
    findings.ok("connection", format!("{} answers", config.redis_url));
    match look(config, &mut connection, findings).await {
        Ok(processes) => processes.max(1),
        Err(error) => {
            let (found, remedy) = explain(&error);
            if error.is_io_error() || error.is_connection_dropped() {
                findings.unreachable(format!("{} {found}", config.redis_url), remedy);
            } else {
                findings.error("stream", format!("cannot be inspected: {error}"), remedy);
            }
            1
        }
    }
}

async fn look(config: &Config, connection: &mut Stream, findings: &mut Findings) -> StreamResult<usize> {
    // Missing permissions are reported by the rights check.
    let info = permitted(connection.server_info().await)?;
    if let Some(info) = &info {
        let info = Info(info);
        let mode = info.text("redis_mode");
        if let Some((what, remedy)) = not_a_server(mode) {
            findings.error("mode", what, remedy);
            return Ok(0);
        }
        version(info, findings);
        eviction(info, findings);
        let settings = Settings::read(connection).await?;
        persistence(info, &settings, findings);
        memory(config, info, findings);
    }
    let asked = Instant::now();
    if let Some((seconds, micros)) = permitted(connection.server_time().await)? {
        findings.clock(seconds as f64 + micros as f64 / 1e6, asked.elapsed());
    }
    if !may_do_everything(config, connection, findings).await? {
        return Ok(0);
    }
    let report = crate::report::report(connection).await?;
    stream(config, &report, findings);
    dead_letters(config, &report, connection, findings).await?;
    missing(&report, connection.noted().await?.refill, findings);
    let ids: BTreeSet<&str> = report
        .consumers
        .iter()
        .filter_map(|consumer| consumer.name.rsplit_once('-').map(|(id, _)| id))
        .collect();
    let mut leased = BTreeSet::new();
    for id in ids {
        if connection.is_leased(id).await? {
            leased.insert(id);
        }
    }
    if report.stream.group_exists {
        let pending = connection.pending(PENDING_SEEN).await?;
        consumers(config, &report, &pending, &leased, findings);
        dangling(&pending, connection, findings).await?;
    }
    Ok(leased.len())
}

/// A server that does not hold all keys: its kind, and the remedy.
fn not_a_server(mode: &str) -> Option<(&'static str, &'static str)> {
    match mode {
        "sentinel" => Some((
            "this is a Sentinel, which holds no data",
            "name the master itself in REDIS_URL: redis-cli -p <this port> SENTINEL get-master-addr-by-name <name>",
        )),
        "cluster" => Some((
            "this is a node of a Redis Cluster, which standpipe cannot use yet",
            "name a single server in REDIS_URL (cluster-enabled no)",
        )),
        _ => None,
    }
}

/// The answer, unless our user lacks the permission.
fn permitted<T>(answer: StreamResult<T>) -> StreamResult<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.code() == Some("NOPERM") => Ok(None),
        Err(error) => Err(error),
    }
}

/// The cause of an error, and the remedy.
fn explain(error: &StreamError) -> (String, &'static str) {
    let text = error.to_string();
    let says = |part: &str| text.contains(part);
    let other_name = says("NotValidForName") || says("not valid for name");
    let remedy = if says("MOVED") || says("CROSSSLOT") || says("CrossSlot") || says("CLUSTERDOWN") {
        "this is a node of a Redis Cluster, which standpipe cannot use yet: name a single server in REDIS_URL"
    } else if says("READONLY") {
        "this is a replica: name its master in REDIS_URL"
    } else if says("invalid peer certificate") && !other_name {
        "use a certificate from a trusted authority, or set REDIS_CA_FILE to the authority's file"
    } else if other_name {
        "use the host name from its certificate in REDIS_URL"
    } else if says("InvalidContentType") {
        "this port does not speak TLS: use redis:// in REDIS_URL, or the TLS port"
    } else if commands::refused_login(error)
        || says("WRONGPASS")
        || says("NOAUTH")
        || says("invalid username-password")
    {
        "correct the user and password in REDIS_URL; percent-encode special characters"
    } else if says("LOADING") {
        "wait until it has loaded its data"
    } else {
        "start it, or correct the host and port in REDIS_URL"
    };
    let found = if says("invalid peer certificate") {
        format!("has an untrusted certificate: {text}")
    } else if remedy.starts_with("correct the user") {
        format!("refuses the user or password: {text}")
    } else {
        format!("cannot be used: {text}")
    };
    (found, remedy)
}
