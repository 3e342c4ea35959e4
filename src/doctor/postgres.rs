//! PostgreSQL: what it is, how it keeps what it has, what our role may do, connections, tables and indexes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::store::{Client, Row};

use super::{Findings, rough, size, some_of};
use crate::config::{Config, DatabaseUrl};
use crate::store::migrate::{self, Found};
use crate::store::tls::Strictness;
use crate::store::verdict::Verdict;
use crate::store::{Store, StoreError, settings};

/// Transactions that are open for longer hold vacuum back noticeably.
const LONG: Duration = Duration::from_mins(10);
/// Connections of a process beside those of its pipelines: readiness, house-keeping, a migration.
const OTHERS: usize = 3;

/// `processes` is how many have pipelines at work.
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
        // A server that answers, and cannot be worked with as it is set up.
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
    let row = client.query_one(include_str!("../../sql/check/settings.sql"), &[]).await?;
    let took = asked.elapsed();
    let role: String = row.get("role");
    findings.ok("connection", format!("{url} answers, as role {role}"));
    encryption(url, &row, findings);
    server(&row, findings);
    durability(&row, findings);
    findings.clock(row.get("clock"), took);
    connections(config, processes, &row, findings);

    let mut tables: Vec<&str> = migrate::KEYS.iter().map(|(table, _)| *table).collect();
    tables.dedup();
    // Rights first: without them the other checks can hardly run.
    let rights = client.query(include_str!("../../sql/check/rights.sql"), &[&tables]).await?;
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
    transactions(client, findings).await
}

/// Whether the settings of our connections are those that we made, read back.
async fn settings(client: &Client, findings: &mut Findings) -> Result<(), StoreError> {
    for (name, is, wanted) in settings::different(client).await? {
        findings.error(
            "settings",
            format!("{name} is {is} on our connections, where it was set to {wanted}"),
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
        Some("28P01") => "correct the user and password in DATABASE_URL; percent-encode special characters".to_owned(),
        Some("28000") => "let the role in: CREATE ROLE ... LOGIN, and a line for it in pg_hba.conf".to_owned(),
        Some("3D000") => "create the database (createdb), or correct its name in DATABASE_URL".to_owned(),
        Some("53300") => format!(
            "raise max_connections or the role's CONNECTION LIMIT, or lower DB_POOL_SIZE ({}) of every process",
            config.db_pool_size
        ),
        Some("42501") => "GRANT the role what it lacks; docs/security.md has the statements".to_owned(),
        Some("57P03") => "wait until it has started".to_owned(),
        _ if says("NotValidForName") || says("not valid for name") => {
            "write into DATABASE_URL the host's name that stands in its certificate, or sslmode=verify-ca".to_owned()
        }
        _ if says("invalid peer certificate") => {
            "have a trusted authority sign its certificate, or give the file of the authority that did: PGSSLROOTCERT, \
             or sslrootcert= in DATABASE_URL"
                .to_owned()
        }
        _ if says("does not support TLS") => {
            "turn ssl on in postgresql.conf; on a network that you trust write sslmode=disable".to_owned()
        }
        Some(_) => "check the server's log".to_owned(),
        None => "start it, or correct the host and port in DATABASE_URL".to_owned(),
    };
    let found = if says("invalid peer certificate") {
        format!("has a certificate that is not trusted: {text}")
    } else if matches!(error.sqlstate.as_deref(), Some("28P01" | "28000")) {
        format!("refuses the user or password: {text}")
    } else {
        format!("cannot be used: {text}")
    };
    (found, remedy)
}

fn encryption(url: &DatabaseUrl, row: &Row, findings: &mut Findings) {
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
            format!("{tls}; sslmode={} takes any certificate", url.ssl_mode().unwrap_or("prefer")),
            "on any network that you do not trust: sslmode=verify-full in DATABASE_URL",
        ),
        Strictness::Authority => {
            findings.ok(WHAT, format!("{tls}, certificate verified, the host's name not (sslmode=verify-ca)"));
        }
        Strictness::Full => findings.ok(WHAT, format!("{tls}, certificate and host's name verified")),
    }
}

fn server(row: &Row, findings: &mut Findings) {
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
            format!("the database is {encoding}: most records hold characters that it has no room for"),
            "create it anew: CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0",
        );
    }
}

fn durability(row: &Row, findings: &mut Findings) {
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
            "full_page_writes is off: unless the file system writes pages whole, a crash of the machine may leave torn \
             ones",
            "full_page_writes = on in postgresql.conf",
        );
    }
    if row.get("fsync") {
        let commit: String = row.get("synchronous_commit");
        let standbys: bool = row.get("has_standbys");
        let waits = match commit.as_str() {
            "remote_apply" if standbys => "its standbys have applied it (synchronous_commit = remote_apply)",
            _ if standbys => "its disk and its synchronous standbys have it",
            _ => "its disk has it",
        };
        if standbys && row.get::<_, i32>("standbys") == 0 {
            let names: String = row.get("standby_names");
            findings.error(
                WHAT,
                format!("synchronous_standby_names is {names}, and no standby is connected: every commit waits for it"),
                "start the standby, or ALTER SYSTEM RESET synchronous_standby_names and reload",
            );
            return;
        }
        let own = match commit.as_str() {
            "off" | "local" | "remote_write" => {
                format!(
                    "; synchronous_commit = {commit} is for others: standpipe's flush of each batch asks for \"on\""
                )
            }
            _ => String::new(),
        };
        findings.ok(WHAT, format!("a batch is acknowledged when {waits}{own}"));
    }
    if !row.get::<_, bool>("autovacuum") {
        findings.warning(
            "autovacuum",
            "it is off: counters are updated all the time, and their dead rows pile up",
            "autovacuum = on in postgresql.conf",
        );
    }
}

fn connections(config: &Config, processes: usize, row: &Row, findings: &mut Findings) {
    const WHAT: &str = "connections";
    let number = |name: &str| i64::from(row.get::<_, i32>(name));
    let (max, reserved) = (number("max_connections"), number("reserved"));
    let pool = i64::try_from(config.db_pool_size).unwrap_or(i64::MAX);
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
    let asks = format!("DB_POOL_SIZE={pool} × {processes} = {wanted}");
    let remedy = format!(
        "{raise}, or lower DB_POOL_SIZE: a process uses one for each busy pipeline and {OTHERS} more, here {enough}"
    );
    if wanted > limit {
        findings.error(
            WHAT,
            format!(
                "{asks}, and this role gets at most {limit} (max_connections {max}, {reserved} reserved)"
            ),
            remedy,
        );
    } else if wanted > limit - others {
        findings.warning(
            WHAT,
            format!("{asks} of {limit}, and others use {others} of them at this moment"),
            remedy,
        );
    } else {
        findings.ok(WHAT, format!("{asks} of {limit}; others use {others}"));
    }
}

/// Reports the role's missing rights; returns whether there were any.
fn missing_rights(role: &str, rows: &[Row], findings: &mut Findings) -> bool {
    const WHAT: &str = "rights";
    let mut by_object: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in rows {
        by_object.entry(row.get("object")).or_default().push(row.get("privilege"));
    }
    if by_object.is_empty() {
        return false;
    }
    let lacking: Vec<String> =
        by_object.iter().map(|(object, rights)| format!("{} on {object}", rights.join(", "))).collect();
    let grants: Vec<String> = by_object
        .iter()
        .map(|(object, rights)| {
            // GRANT ... ON TABLE x; a function's arguments stand with its name already.
            format!("GRANT {} ON {object} TO {role}", rights.join(", "))
        })
        .collect();
    findings.error(
        WHAT,
        format!("role {role} lacks {}", some_of(&lacking)),
        format!(
            "as the owner: {}{}",
            grants.iter().take(3).cloned().collect::<Vec<_>>().join("; "),
            if grants.len() > 3 { "; and so on, docs/security.md has the statements" } else { "" }
        ),
    );
    true
}

async fn migrations(
    config: &Config,
    client: &Client,
    found: &Found,
    row: &Row,
    lacks: bool,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    const WHAT: &str = "migrations";
    let wanted = migrate::wanted();
    let role: String = row.get("role");
    let plan = match migrate::plan(client).await {
        Ok(plan) => plan,
        // A newer program's tables, or tables of another owner.
        Err(error) if found.version > wanted => {
            findings.error(WHAT, error.message, "use a standpipe at least as new as the one that migrated");
            return Ok(());
        }
        Err(error) => {
            findings.error(
                "rights",
                error.message,
                format!("run `standpipe migrate` once as the owner, and GRANT the owner's role to {role} or what docs/security.md lists"),
            );
            return Ok(());
        }
    };
    for warning in plan.warnings() {
        findings.warning("tables", warning, "");
    }
    if found.is_current() {
        if !lacks {
            findings.ok("rights", format!("role {role} may do everything that applying events needs"));
        }
        findings
            .ok(WHAT, format!("the tables are at version {}, with this program's functions", found.version));
        return Ok(());
    }
    let is = match (found.version, found.functions) {
        (0, _) => "there are no tables of this program yet".to_owned(),
        (version, _) if version < wanted => format!("the tables are at version {version} of {wanted}"),
        (_, false) => "the functions are those of another version of this program".to_owned(),
        _ => "a unique index forbids rows that repositories can legitimately contain".to_owned(),
    };
    let schema: String = row.get("schema");
    let mut grants = Vec::new();
    // Our own schema is made with the first version; later only its tables and functions are.
    if found.version == 0 && !row.get::<_, bool>("may_create_schema") {
        let database: String = row.get("database");
        grants.push(format!("GRANT CREATE ON DATABASE {database} TO {role}"));
    }
    if !row.get::<_, bool>("may_create_table") {
        let schema = if schema.is_empty() { "public" } else { &schema };
        grants.push(format!("GRANT CREATE ON SCHEMA {schema} TO {role}"));
    }
    if found.version > 0 && !owns_functions(client).await? {
        findings.error(
            "rights",
            format!("{is}, and role {role} does not own schema standpipe and what is in it"),
            "run `standpipe migrate` as the role that owns them",
        );
    } else if !grants.is_empty() {
        findings.error(
            "rights",
            format!("{is}, and role {role} may not CREATE what is missing"),
            format!("{}; or run `standpipe migrate` once as the owner", grants.join("; ")),
        );
    } else if config.auto_migrate {
        findings.ok("rights", format!("role {role} may create what is missing"));
        findings.note(
            WHAT,
            is,
            "nothing: the next start of a worker sees to it, as does `standpipe migrate`",
        );
    } else {
        findings.error(WHAT, format!("{is}, and AUTO_MIGRATE is false"), "run `standpipe migrate`");
    }
    Ok(())
}

async fn owns_functions(client: &Client) -> Result<bool, StoreError> {
    let sql = include_str!("../../sql/store/may_create.sql");
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// An index as it is.
struct Index {
    table: String,
    name: String,
    /// The first one.
    column: String,
    /// Of this column alone.
    unique: bool,
    condition: Condition,
    bytes: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Good,
    /// No query uses it.
    Unused,
    BeingBuilt,
    /// Its build was interrupted.
    Invalid,
}

impl Index {
    fn works(&self) -> bool {
        matches!(self.condition, Condition::Good | Condition::Unused)
    }
}

async fn indexes(client: &Client, tables: &[&str], findings: &mut Findings) -> Result<(), StoreError> {
    const WHAT: &str = "indexes";
    /// Smaller ones cost next to nothing.
    const LARGE: i64 = 8 << 20;
    let rows = client.query(include_str!("../../sql/check/indexes.sql"), &[&tables]).await?;
    let there: Vec<Index> = rows
        .iter()
        .map(|row| Index {
            table: row.get("table_name"),
            name: row.get("name"),
            column: row.get("first_column"),
            unique: row.get("one_column_unique"),
            condition: if !row.get::<_, bool>("valid") {
                if row.get("under_way") { Condition::BeingBuilt } else { Condition::Invalid }
            } else if row.get::<_, Option<bool>>("unused").unwrap_or(false) {
                Condition::Unused
            } else {
                Condition::Good
            },
            bytes: row.get("bytes"),
        })
        .collect();
    let before: Vec<String> = client
        .query(include_str!("../../sql/store/tables_before.sql"), &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let mut good = true;
    for (table, key) in migrate::KEYS {
        let whole =
            |index: &&Index| index.table == *table && index.column == *key && index.works() && index.unique;
        if there.iter().find(whole).is_none() {
            good = false;
            findings.error(
                WHAT,
                format!("{table} has no unique index on {key}: nothing can be written to it"),
                format!("CREATE UNIQUE INDEX CONCURRENTLY ON {table} ({key})"),
            );
        }
    }
    for index in migrate::indexes() {
        let serves =
            |other: &&Index| other.table == index.table && other.column == index.column && other.works();
        // A table that was here before us has the indexes that its own application wants.
        let wanted = index.everywhere || !before.contains(&index.table);
        if wanted && there.iter().find(serves).is_none() {
            good = false;
            findings.warning(
                WHAT,
                format!(
                    "{} has no index that begins with {}: lookups by it read the whole table",
                    index.table, index.column
                ),
                index.sql,
            );
        }
    }
    for index in there.iter().filter(|index| index.condition == Condition::Invalid) {
        good = false;
        findings.warning(
            WHAT,
            format!(
                "{} is INVALID (its build was interrupted): every write maintains it, no query uses it",
                index.name
            ),
            format!(
                "DROP INDEX CONCURRENTLY {}, then `standpipe migrate` builds what is missing",
                index.name
            ),
        );
    }
    if good {
        findings.ok(WHAT, format!("all required indexes exist, {} in total", there.len()));
    }
    let unused: Vec<String> = there
        .iter()
        .filter(|index| index.condition == Condition::Unused && index.bytes > LARGE)
        .map(|index| format!("{} ({})", index.name, size(u64::try_from(index.bytes).unwrap_or(0))))
        .collect();
    if !unused.is_empty() {
        findings.note(
            WHAT,
            format!("no query has used {} since the statistics began", some_of(&unused)),
            "they slow every write: if no replica's queries use them either, DROP INDEX CONCURRENTLY",
        );
    }
    Ok(())
}

async fn bloat(client: &Client, tables: &[&str], findings: &mut Findings) -> Result<(), StoreError> {
    const WHAT: &str = "dead rows";
    let rows = client.query(include_str!("../../sql/check/tables.sql"), &[&tables]).await?;
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
            format!("a fifth or more of {}", some_of(&bloated)),
            "VACUUM them; if it recurs: ALTER TABLE ... SET (autovacuum_vacuum_scale_factor = 0.05)",
        );
    }
    Ok(())
}

async fn transactions(client: &Client, findings: &mut Findings) -> Result<(), StoreError> {
    const WHAT: &str = "transactions";
    let rows = client.query(include_str!("../../sql/check/transactions.sql"), &[&LONG.as_secs_f64()]).await?;
    if rows.is_empty() {
        findings.ok(WHAT, "none that is visible has been open for long");
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
            "open: {}; vacuum removes nothing that died since, and migrations wait for them",
            open.join("; ")
        ),
        "end it, or SELECT pg_terminate_backend(pid)",
    );
    Ok(())
}
