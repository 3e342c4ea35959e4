//! `standpipe check`: Redis, then PostgreSQL, then settings and permissions; what is wrong and what to do.

use std::fmt;
use std::time::Duration;

use crate::config::Config;
use crate::store::{Store, migrate};
use crate::stream::{Keys, Redis};

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub struct Finding {
    level: Level,
    /// What was looked at.
    what: &'static str,
    /// What was found.
    found: String,
    /// What to do about it; empty where there is nothing to do.
    remedy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Good,
    Warning,
    Bad,
    Unreachable,
}

/// What all findings together come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing stands in the way.
    Healthy,
    /// Something has to be put right.
    Unhealthy,
    /// A service cannot be reached.
    Unreachable,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.level {
            Level::Good => "ok     ",
            Level::Warning => "warning",
            Level::Bad | Level::Unreachable => "WRONG  ",
        };
        write!(f, "{mark}  {}: {}", self.what, self.found)?;
        if !self.remedy.is_empty() {
            write!(f, "\n         -> {}", self.remedy)?;
        }
        Ok(())
    }
}

impl Finding {
    fn new(level: Level, what: &'static str, found: impl Into<String>, remedy: &str) -> Self {
        Self { level, what, found: found.into(), remedy: remedy.to_owned() }
    }
}

/// The worst of them.
#[must_use]
pub fn verdict(findings: &[Finding]) -> Verdict {
    if findings.iter().any(|finding| finding.level == Level::Unreachable) {
        Verdict::Unreachable
    } else if findings.iter().any(|finding| finding.level == Level::Bad) {
        Verdict::Unhealthy
    } else {
        Verdict::Healthy
    }
}

/// Looks at everything. Changes nothing.
pub async fn check(config: &Config) -> Vec<Finding> {
    let mut findings = vec![Finding::new(Level::Good, "configuration", "every variable is understood", "")];
    check_redis(config, &mut findings).await;
    match &config.database_url {
        Some(_) => check_postgres(config, &mut findings).await,
        None => findings.push(Finding::new(
            Level::Warning,
            "PostgreSQL",
            "DATABASE_URL is not set",
            "set it unless this machine runs only the reader",
        )),
    }
    findings
}

async fn check_redis(config: &Config, findings: &mut Vec<Finding>) {
    let connected = match Redis::new(config.redis_url.expose()) {
        Ok(redis) => redis.connect().await,
        Err(error) => Err(error),
    };
    let info = async {
        let mut connection = connected?;
        let info: String = redis::cmd("INFO").query_async(&mut connection).await?;
        let report = crate::report::report(&mut connection, &Keys::new(config)).await?;
        Ok::<_, redis::RedisError>((info, report))
    };
    let (info, report) = match info.await {
        Ok(answers) => answers,
        Err(error) => {
            findings.push(Finding::new(
                Level::Unreachable,
                "Redis",
                format!("cannot be used at {}: {error}", config.redis_url),
                "start it, or correct REDIS_URL",
            ));
            return;
        }
    };
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')))
            .unwrap_or("")
            .trim()
            .to_owned()
    };
    let version = field("redis_version");
    let old = version.split('.').filter_map(|part| part.parse::<u32>().ok()).take(2).collect::<Vec<_>>()
        < vec![6, 2];
    findings.push(if old {
        Finding::new(Level::Bad, "Redis", format!("is version {version}"), "version 6.2 or later is needed")
    } else {
        Finding::new(Level::Good, "Redis", format!("version {version} answers"), "")
    });
    let policy = field("maxmemory_policy");
    findings.push(if policy == "noeviction" {
        Finding::new(Level::Good, "Redis eviction", "noeviction", "")
    } else {
        Finding::new(
            Level::Bad,
            "Redis eviction",
            format!("maxmemory-policy is {policy}: Redis may throw the stream away"),
            "set maxmemory-policy noeviction",
        )
    });
    findings.push(if field("aof_enabled") == "1" {
        Finding::new(Level::Good, "Redis persistence", "append-only file", "")
    } else {
        Finding::new(
            Level::Warning,
            "Redis persistence",
            "no append-only file: a restart of Redis loses the stream and the cursor",
            "set appendonly yes, appendfsync everysec: then a crash loses a second, which the relay repeats",
        )
    });
    let stream = report.stream;
    findings.push(Finding::new(
        Level::Good,
        "stream",
        format!(
            "{}: {} entries, group {} {}, {} pending, {} dead letters",
            stream.key,
            stream.length,
            stream.group,
            if stream.group_exists { "exists" } else { "will be created at start" },
            stream.pending,
            report.dead_letters,
        ),
        "",
    ));
}

async fn check_postgres(config: &Config, findings: &mut Vec<Finding>) {
    let asked = async {
        let store = Store::new(config).map_err(|error| error.to_string())?;
        let session = tokio::time::timeout(Duration::from_secs(15), store.session())
            .await
            .map_err(|_| "no answer within 15 s".to_owned())?
            .map_err(|error| error.to_string())?;
        let row = session
            .client()
            .query_one(
                "SELECT current_setting('server_version_num')::int, current_setting('server_version'),
                        current_setting('max_connections')::int, current_setting('synchronous_commit'),
                        current_setting('fsync'), has_database_privilege(current_database(), 'CREATE'),
                        has_schema_privilege(current_schema(), 'CREATE'), pg_is_in_recovery()",
                &[],
            )
            .await
            .map_err(|error| crate::store::verdict::describe(&error))?;
        let found = migrate::look(session.client()).await.map_err(|error| error.to_string())?;
        Ok::<_, String>((row, found))
    };
    let (row, found) = match asked.await {
        Ok(answers) => answers,
        Err(error) => {
            let what = config.database_url.as_ref().map(ToString::to_string).unwrap_or_default();
            findings.push(Finding::new(
                Level::Unreachable,
                "PostgreSQL",
                format!("cannot be used at {what}: {error}"),
                "start it, or correct DATABASE_URL",
            ));
            return;
        }
    };
    let (number, version): (i32, String) = (row.get(0), row.get(1));
    findings.push(if number < 140_000 {
        Finding::new(
            Level::Bad,
            "PostgreSQL",
            format!("is version {version}"),
            "version 14 or later is needed",
        )
    } else {
        Finding::new(Level::Good, "PostgreSQL", format!("version {version} answers"), "")
    });
    if row.get::<_, bool>(7) {
        findings.push(Finding::new(
            Level::Bad,
            "PostgreSQL",
            "is a standby and takes no writes",
            "point DATABASE_URL at the primary",
        ));
    }
    let connections: i32 = row.get(2);
    let pool = i32::try_from(config.db_pool_size).unwrap_or(i32::MAX);
    findings.push(if pool.saturating_add(3) > connections {
        Finding::new(
            Level::Bad,
            "PostgreSQL connections",
            format!("DB_POOL_SIZE={pool} of max_connections={connections}"),
            "lower DB_POOL_SIZE or raise max_connections",
        )
    } else {
        Finding::new(Level::Good, "PostgreSQL connections", format!("{pool} of {connections}"), "")
    });
    if row.get::<_, String>(4) == "off" {
        findings.push(Finding::new(
            Level::Bad,
            "PostgreSQL durability",
            "fsync is off: a crash of the machine may destroy the database",
            "set fsync = on",
        ));
    }
    findings.push(if found.is_current() {
        Finding::new(Level::Good, "tables", format!("at version {}", found.version), "")
    } else if found.version > migrate::wanted() {
        Finding::new(
            Level::Bad,
            "tables",
            format!("at version {}, newer than this program", found.version),
            "use a newer standpipe",
        )
    } else if row.get::<_, bool>(5) && row.get::<_, bool>(6) {
        Finding::new(
            Level::Good,
            "tables",
            format!("at version {} of {}; migrated at the next start", found.version, migrate::wanted()),
            "",
        )
    } else {
        Finding::new(
            Level::Bad,
            "tables",
            "have to be migrated, and the role may not create schemas or tables",
            "GRANT CREATE ON DATABASE and ON SCHEMA, or run `standpipe migrate` as the owner",
        )
    });
}
