//! The server's version, encryption, durability and connections.

use crate::config::{Config, DatabaseUrl};
use crate::doctor::Findings;
use crate::store::Row;
use crate::store::tls::Strictness;

/// Connections of a process besides those of its pipelines: readiness, housekeeping, a migration.
const OTHERS: usize = 3;

pub(super) fn encryption(url: &DatabaseUrl, row: &Row, findings: &mut Findings) {
    const WHAT: &str = "encryption";
    let tls: String = row.get("tls");
    match Strictness::of(url.ssl_mode()) {
        _ if tls.is_empty() => findings.note(
            WHAT,
            "none",
            "on any network that you do not trust: sslmode=verify-full in DATABASE_URL, and ssl = on in postgresql.conf",
        ),
        Strictness::Lenient => findings.note(
            WHAT,
            format!("{tls}; sslmode={} accepts any certificate", url.ssl_mode().unwrap_or("prefer")),
            "on any network that you do not trust: sslmode=verify-full in DATABASE_URL",
        ),
        Strictness::Authority => {
            findings.ok(WHAT, format!("{tls}, certificate verified, host name not checked (sslmode=verify-ca)"));
        }
        Strictness::Full => findings.ok(WHAT, format!("{tls}, certificate and host name verified")),
    }
}

pub(super) fn server(row: &Row, findings: &mut Findings) {
    let (number, version): (i32, String) = (row.get("number"), row.get("version"));
    if number < 140_000 {
        findings.error("version", format!("PostgreSQL {version}"), "upgrade to version 14 or later");
    } else {
        findings.ok("version", format!("PostgreSQL {version}"));
    }
    if row.get("standby") {
        findings.error(
            "role of server",
            "it is a standby and accepts no writes",
            "point DATABASE_URL at the primary",
        );
    }
    let encoding: String = row.get("encoding");
    if encoding != "UTF8" {
        findings.error(
            "encoding",
            format!("the database's encoding is {encoding}, which cannot store characters that most records contain"),
            "recreate it: CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0",
        );
    }
}

pub(super) fn durability(row: &Row, findings: &mut Findings) {
    const WHAT: &str = "durability";
    if !row.get::<_, bool>("fsync") {
        findings.error(
            WHAT,
            "fsync is off: a crash of the machine may destroy the whole database",
            "fsync = on in postgresql.conf",
        );
    }
    if !row.get::<_, bool>("full_page_writes") {
        findings.warning(
            WHAT,
            "full_page_writes is off: unless the file system writes pages atomically, a crash of the machine may leave \
             torn pages",
            "full_page_writes = on in postgresql.conf",
        );
    }
    if row.get("fsync") {
        let commit: String = row.get("synchronous_commit");
        let standbys: bool = row.get("has_standbys");
        let waits = match commit.as_str() {
            "remote_apply" if standbys => "its standbys have applied it (synchronous_commit = remote_apply)",
            _ if standbys => "it is on disk, here and on the synchronous standbys",
            _ => "it is on disk",
        };
        if standbys && row.get::<_, i32>("standbys") == 0 {
            let names: String = row.get("standby_names");
            findings.error(
                WHAT,
                format!(
                    "synchronous_standby_names is {names}, and no standby is connected: every commit waits for \
                     one"
                ),
                "start the standby, or ALTER SYSTEM RESET synchronous_standby_names and reload",
            );
            return;
        }
        let own = match commit.as_str() {
            "off" | "local" | "remote_write" => {
                format!(
                    "; synchronous_commit = {commit} affects others only: standpipe flushes each batch with \"on\""
                )
            }
            _ => String::new(),
        };
        findings.ok(WHAT, format!("a batch is acknowledged when {waits}{own}"));
    }
    if !row.get::<_, bool>("autovacuum") {
        findings.warning(
            "autovacuum",
            "it is off: counters are updated constantly, and their dead rows pile up",
            "autovacuum = on in postgresql.conf",
        );
    }
}

pub(super) fn connections(config: &Config, processes: usize, row: &Row, findings: &mut Findings) {
    const WHAT: &str = "connections";
    let number = |name: &str| i64::from(row.get::<_, i32>(name));
    let (max, reserved) = (number("max_connections"), number("reserved"));
    // One more than pipelines for tasks; see `Handlers::new`.
    let handlers = config.handlers.as_ref().map_or(0, |_| config.handler_pipelines + 1);
    let pool = i64::try_from(config.db_pool_size + handlers).unwrap_or(i64::MAX);
    let wanted = pool.saturating_mul(i64::try_from(processes).unwrap_or(1));
    let others = (number("connections") - number("ours")).max(0);
    let role: String = row.get("role");
    // Below 0 there is no limit.
    let limits = [
        (number("role_limit"), format!("ALTER ROLE {role} CONNECTION LIMIT {wanted}")),
        (
            number("database_limit"),
            format!("ALTER DATABASE {} CONNECTION LIMIT {wanted}", row.get::<_, String>("database")),
        ),
    ];
    let server = (
        max - reserved,
        format!("raise max_connections to {} in postgresql.conf and restart it", wanted + reserved + others),
    );
    let (limit, raise) = limits
        .into_iter()
        .filter(|(limit, _)| *limit >= 0)
        .chain([server])
        .min_by_key(|(limit, _)| *limit)
        .unwrap_or((max, String::new()));
    let enough = config.parallel_consumers + OTHERS;
    let processes = if processes == 1 { "1 process".to_owned() } else { format!("{processes} processes") };
    let asks = match handlers {
        0 => format!("DB_POOL_SIZE={pool} × {processes} = {wanted}"),
        _ => {
            format!("(DB_POOL_SIZE={} + {handlers} for tasks) × {processes} = {wanted}", config.db_pool_size)
        }
    };
    let remedy = format!(
        "{raise}, or lower DB_POOL_SIZE: a process uses one for each busy pipeline and {OTHERS} more, here {enough}"
    );
    if wanted > limit {
        findings.error(
            WHAT,
            format!(
                "{asks}, but this role gets at most {limit} (max_connections {max}, {reserved} reserved)"
            ),
            remedy,
        );
    } else if wanted > limit - others {
        findings.warning(
            WHAT,
            format!("{asks} of {limit}, and others currently use {others} of them"),
            remedy,
        );
    } else {
        findings.ok(WHAT, format!("{asks} of {limit}; others use {others}"));
    }
}
