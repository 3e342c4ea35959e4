//! PostgreSQL: version, durability, our role's rights, connections, tables and indexes.

mod handlers;
mod indexes;
mod schema;
mod server;

use std::time::{Duration, Instant};

use self::handlers::handlers;
use self::indexes::indexes;
use self::schema::{migrations, missing_rights};
use self::server::{connections, durability, encryption, server};
use super::{Findings, rough, some_of};
use crate::config::{Config, DatabaseUrl};
use crate::store::verdict::Verdict;
use crate::store::{Client, Store, StoreError, migrate, settings};

/// Transactions open for longer than this noticeably hold back vacuum.
const LONG: Duration = Duration::from_mins(10);

/// Runs the checks. `processes` is the number of processes with running pipelines.
pub async fn check(config: &Config, processes: usize, findings: &mut Findings) {
    let Some(url) = &config.database_url else { return };
    let session = async {
        let store =
            Store::new(config).map_err(|error| StoreError::new(Verdict::Halt, format!("{error:#}")))?;
        let session = async {
            store.refuse_transaction_pooling().await?;
            store.session().await
        };
        tokio::time::timeout(Duration::from_secs(15), session)
            .await
            .map_err(|_| StoreError::new(Verdict::Reconnect, "no answer within 15 s"))?
    };
    let session = match session.await {
        Ok(session) => session,
        // The server answers, but its configuration rules out working with it.
        Err(error) if error.verdict == Verdict::Halt && error.sqlstate.is_none() => {
            findings.ok("connection", format!("{url} answers"));
            findings.error(
                "settings",
                error.message,
                "see docs/operations.md, \"PostgreSQL refuses to be worked with\"",
            );
            return;
        }
        Err(error) => {
            let (found, remedy) = explain(&error, config);
            findings.unreachable(format!("{url} {found}"), remedy);
            return;
        }
    };
    if let Err(error) = look(config, url, processes, session.client(), findings).await {
        let (found, remedy) = explain(&error, config);
        if error.verdict == Verdict::Reconnect {
            findings.unreachable(format!("{url} {found}"), remedy);
        } else {
            findings.error("database", found, remedy);
        }
    }
}

async fn look(
    config: &Config,
    url: &DatabaseUrl,
    processes: usize,
    client: &Client,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    settings(client, findings).await?;
    let asked = Instant::now();
    let row = client.query_one(include_str!("../../../sql/check/settings.sql"), &[]).await?;
    let took = asked.elapsed();
    let role: String = row.get("role");
    findings.ok("connection", format!("{url} answers as role {role}"));
    encryption(url, &row, findings);
    server(&row, findings);
    durability(&row, findings);
    findings.clock(row.get("clock"), took);
    connections(config, processes, &row, findings);

    let mut tables: Vec<&str> = migrate::keys().into_iter().map(|(table, _)| table).collect();
    tables.dedup();
    // Rights first: without them the other checks can hardly run.
    let rights = client.query(include_str!("../../../sql/check/rights.sql"), &[&tables]).await?;
    let lacks = missing_rights(&role, &rights, findings);
    let found = match migrate::look(client).await {
        Ok(found) => found,
        Err(_) if lacks => return Ok(()),
        Err(error) => return Err(error),
    };
    migrations(config, client, &found, &row, lacks, findings).await?;
    if found.version > 0 {
        indexes(client, &tables, findings).await?;
        bloat(client, &tables, findings).await?;
    }
    transactions(client, findings).await?;
    if let Some(schema) = &config.handlers {
        handlers(schema, client, findings).await?;
    }
    Ok(())
}

/// Whether our connections have the settings that we made, read back.
async fn settings(client: &Client, findings: &mut Findings) -> Result<(), StoreError> {
    for (name, is, wanted) in settings::different(client).await? {
        findings.error(
            "settings",
            format!("{name} is {is} on our connections, although it was set to {wanted}"),
            "find out what changes it: a pooler, or an extension",
        );
    }
    Ok(())
}

/// The cause of an error, and the remedy.
fn explain(error: &StoreError, config: &Config) -> (String, String) {
    let text = &error.message;
    let says = |part: &str| text.contains(part);
    let remedy = match error.sqlstate.as_deref() {
        Some("28P01") => {
            "correct the user and password in DATABASE_URL; percent-encode special characters".to_owned()
        }
        Some("28000") => {
            "allow the role to log in: CREATE ROLE ... LOGIN, and a line for it in pg_hba.conf".to_owned()
        }
        Some("3D000") => "create the database (createdb), or correct its name in DATABASE_URL".to_owned(),
        Some("53300") => format!(
            "raise max_connections or the role's CONNECTION LIMIT, or lower DB_POOL_SIZE ({}) of every process",
            config.db_pool_size
        ),
        Some("42501") => "GRANT the missing rights; docs/security.md has the statements".to_owned(),
        Some("57P03") => "wait until it has started".to_owned(),
        _ if says("NotValidForName") || says("not valid for name") => {
            "use the host name from its certificate in DATABASE_URL, or sslmode=verify-ca".to_owned()
        }
        _ if says("invalid peer certificate") => {
            "use a certificate from a trusted authority, or name the authority's file: PGSSLROOTCERT, or \
             sslrootcert= in DATABASE_URL"
                .to_owned()
        }
        _ if says("does not support TLS") => {
            "set ssl = on in postgresql.conf; on a network that you trust, use sslmode=disable".to_owned()
        }
        Some(_) => "check the server's log".to_owned(),
        None => "start it, or correct the host and port in DATABASE_URL".to_owned(),
    };
    let found = if says("invalid peer certificate") {
        format!("has an untrusted certificate: {text}")
    } else if matches!(error.sqlstate.as_deref(), Some("28P01" | "28000")) {
        format!("refuses the user or password: {text}")
    } else {
        format!("cannot be used: {text}")
    };
    (found, remedy)
}

async fn bloat(client: &Client, tables: &[&str], findings: &mut Findings) -> Result<(), StoreError> {
    const WHAT: &str = "dead rows";
    let rows = client.query(include_str!("../../../sql/check/tables.sql"), &[&tables]).await?;
    let mut bloated = Vec::new();
    for row in &rows {
        let (dead, live): (i64, i64) = (row.get("dead_rows"), row.get("live_rows"));
        if dead > 10_000 && dead * 5 > dead + live {
            bloated.push(format!(
                "{} ({}%, last vacuum {})",
                row.get::<_, String>("name"),
                dead * 100 / (dead + live),
                row.get::<_, String>("vacuumed")
            ));
        }
    }
    if bloated.is_empty() {
        findings.ok(WHAT, "no table has many");
    } else {
        findings.note(
            WHAT,
            format!("a fifth or more of the rows in {}", some_of(&bloated)),
            "VACUUM them; if it recurs: ALTER TABLE ... SET (autovacuum_vacuum_scale_factor = 0.05)",
        );
    }
    Ok(())
}

async fn transactions(client: &Client, findings: &mut Findings) -> Result<(), StoreError> {
    const WHAT: &str = "transactions";
    let rows =
        client.query(include_str!("../../../sql/check/transactions.sql"), &[&LONG.as_secs_f64()]).await?;
    if rows.is_empty() {
        findings.ok(WHAT, "no visible transaction has been open for long");
        return Ok(());
    }
    let open: Vec<String> = rows
        .iter()
        .map(|row| {
            format!(
                "process {} of {} ({}, {}) for {}",
                row.get::<_, i32>("pid"),
                row.get::<_, String>("role"),
                row.get::<_, String>("application"),
                row.get::<_, String>("state"),
                rough(row.get("seconds"))
            )
        })
        .collect();
    findings.warning(
        WHAT,
        format!(
            "open: {}; vacuum cannot remove rows that died since, and migrations wait for them",
            open.join("; ")
        ),
        "end it, or SELECT pg_terminate_backend(pid)",
    );
    Ok(())
}
