//! Redis: what it is, how it keeps what it has, what our user may do, and how the stream is.

use std::collections::BTreeSet;
use std::time::Instant;

use super::{Findings, rough, size, some_of};
use crate::config::{Config, MemoryMark};
use crate::report::Report;
use crate::stream::dead_letters as letters;
use crate::stream::group::{self, Pending};
use crate::stream::noted::{self, Refill};
use crate::stream::{Connection, Keys, Redis, StreamError, StreamResult, lease, rights, server};

/// Maximum number of pending entries to check.
const PENDING_SEEN: usize = 1000;

/// Returns how many processes have pipelines at work.
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
    let keys = Keys::new(config);
    match look(config, &keys, &mut connection, findings).await {
        Ok(processes) => processes.max(1),
        Err(error) => {
            let (found, remedy) = explain(&error);
            if error.is_io_error() || error.is_connection_dropped() {
                findings.unreachable(format!("{} {found}", config.redis_url), remedy);
            } else {
                findings.error("stream", format!("cannot be looked at: {error}"), remedy);
            }
            1
        }
    }
}

async fn look(
    config: &Config,
    keys: &Keys,
    connection: &mut Connection,
    findings: &mut Findings,
) -> StreamResult<usize> {
    // Missing permissions are reported by the rights check.
    let info = permitted(server::info(connection).await)?;
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
    if let Some((seconds, micros)) = permitted(server::time(connection).await)? {
        findings.clock(seconds as f64 + micros as f64 / 1e6, asked.elapsed());
    }
    if !may_do_everything(config, keys, connection, findings).await? {
        return Ok(0);
    }
    let report = crate::report::report(connection, keys).await?;
    stream(config, &report, findings);
    dead_letters(config, keys, &report, connection, findings).await?;
    missing(&report, noted::read(connection, keys).await?.refill, findings);
    let ids: BTreeSet<&str> = report
        .consumers
        .iter()
        .filter_map(|consumer| consumer.name.rsplit_once('-').map(|(id, _)| id))
        .collect();
    let mut leased = BTreeSet::new();
    for id in ids {
        if lease::is_held(connection, &keys.lease_of(id)).await? {
            leased.insert(id);
        }
    }
    if report.stream.group_exists {
        let pending = group::pending(connection, keys, PENDING_SEEN).await?;
        consumers(config, &report, &pending, &leased, findings);
        dangling(keys, &pending, connection, findings).await?;
    }
    Ok(leased.len())
}

/// The kind of server, where it is not one that holds all keys.
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
        "have a trusted authority sign its certificate, or set REDIS_CA_FILE to the file of the authority that did"
    } else if other_name {
        "write into REDIS_URL the host's name that stands in its certificate"
    } else if says("InvalidContentType") {
        "it does not speak TLS there: write redis:// into REDIS_URL, or its TLS port"
    } else if server::refused_login(error)
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
        format!("has a certificate that is not trusted: {text}")
    } else if remedy.starts_with("correct the user") {
        format!("refuses the user or password: {text}")
    } else {
        format!("cannot be used: {text}")
    };
    (found, remedy)
}

/// The fields that INFO gives.
#[derive(Clone, Copy)]
struct Info<'a>(&'a str);

impl<'a> Info<'a> {
    fn text(self, name: &str) -> &'a str {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')))
            .unwrap_or("")
            .trim()
    }

    fn number(self, name: &str) -> u64 {
        self.text(name).parse().unwrap_or(0)
    }
}

/// The server's configuration; `None` where our user lacks the permission.
struct Settings {
    append_fsync: Option<String>,
    save: Option<String>,
}

impl Settings {
    async fn read(connection: &mut Connection) -> StreamResult<Self> {
        Ok(Self {
            append_fsync: server::setting(connection, "appendfsync").await?,
            save: server::setting(connection, "save").await?,
        })
    }
}

fn version(info: Info<'_>, findings: &mut Findings) {
    let valkey = info.text("valkey_version");
    let version = info.text("redis_version");
    let name = if valkey.is_empty() { format!("Redis {version}") } else { format!("Valkey {valkey}") };
    let numbers: Vec<u32> = version.split('.').filter_map(|part| part.parse().ok()).take(2).collect();
    if numbers < vec![6, 2] {
        findings.error(
            "version",
            format!("{name} has no XAUTOCLAIM"),
            "upgrade to Redis 6.2 or later, or Valkey",
        );
    } else if numbers < vec![7, 0] {
        findings.note(
            "version",
            format!("{name}: it does not count what waits, nor name entries that somebody removed"),
            "Redis 7 or Valkey does both",
        );
    } else {
        findings.ok("version", name);
    }
    if info.text("role") == "slave" {
        findings.error("role", "it is a replica and accepts no writes", "point REDIS_URL at the primary");
    }
    if info.text("redis_mode") == "cluster" {
        findings.error(
            "role",
            "it is a cluster: the scripts need all keys of a stream on one server",
            "use a server that is not a cluster",
        );
    }
    if info.text("loading") == "1" {
        findings.warning("role", "it is loading its data", "wait");
    }
}

fn eviction(info: Info<'_>, findings: &mut Findings) {
    match info.text("maxmemory_policy") {
        "noeviction" => findings.ok("eviction", "noeviction: nothing is evicted"),
        policy if policy.starts_with("volatile-") => findings.ok(
            "eviction",
            format!("{policy}: only leases can be evicted, and they are taken again; noeviction is better"),
        ),
        policy => findings.error(
            "eviction",
            format!(
                "maxmemory-policy is {policy}: when memory is full Redis evicts the stream or the cursor"
            ),
            "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
        ),
    }
}

fn persistence(info: Info<'_>, settings: &Settings, findings: &mut Findings) {
    const WHAT: &str = "persistence";
    const AOF: &str =
        "redis-cli CONFIG SET appendonly yes, and the same with appendfsync everysec in redis.conf";
    if info.text("aof_enabled") == "1" {
        match settings.append_fsync.as_deref() {
            Some("always") => {
                findings.ok(WHAT, "append-only file, flushed at every write: a crash loses nothing");
            }
            Some("everysec") => findings.ok(
                WHAT,
                "append-only file, flushed every second: a crash of the machine loses up to two seconds, stream and \
                 cursor together, and the reader reads them again from the relay",
            ),
            Some(other) => findings.warning(
                WHAT,
                format!(
                    "append-only file, flushed when the kernel decides (appendfsync {other}): a crash of the machine \
                     loses half a minute or more, dead letters among it; the reader reads the rest again from the relay"
                ),
                "redis-cli CONFIG SET appendfsync everysec, and the same in redis.conf",
            ),
            None => findings.note(
                WHAT,
                "append-only file; how often it is flushed cannot be seen, since our user may not CONFIG GET",
                "make sure that redis.conf has appendfsync everysec or always",
            ),
        }
    } else {
        let found = if settings.save.as_deref() == Some("") {
            "nothing is kept: a restart of Redis loses the stream, the cursor and the dead letters; the reader then \
             starts with what the relay sends at that moment, and everything before it is a gap"
                .to_owned()
        } else {
            let saved = info.number("rdb_last_save_time") as f64;
            let age = crate::time::now_ms() as f64 / 1000.0 - saved;
            format!(
                "snapshots only, no append-only file: a crash goes back to the last one, {} and {} changes ago; the \
                 reader reads stream and cursor again from there as far as the relay still has it, dead letters since \
                 then are gone",
                rough(age.max(0.0)),
                info.number("rdb_changes_since_last_save"),
            )
        };
        findings.warning(WHAT, found, AOF);
    }
    if info.text("aof_enabled") == "1" && info.text("aof_last_write_status") == "err" {
        findings.error(
            WHAT,
            "the append-only file cannot be written: Redis refuses all writes",
            "see whether its disk is full",
        );
    }
    if info.text("rdb_last_bgsave_status") == "err" {
        findings.error(
            WHAT,
            "the last snapshot failed: unless stop-writes-on-bgsave-error is off, Redis refuses all writes",
            "see Redis's log, and whether its disk is full or its memory too small to fork",
        );
    }
}

fn memory(config: &Config, info: Info<'_>, findings: &mut Findings) {
    const WHAT: &str = "memory";
    let (used, max) = (info.number("used_memory"), info.number("maxmemory"));
    let mark = match config.memory_mark {
        MemoryMark::Percent(_) if max == 0 => {
            findings.warning(
                WHAT,
                format!(
                    "maxmemory is not set, so REDIS_MEMORY_MARK={} has no effect; {} in use: only \
                     REDIS_MAX_STREAM_LEN={} bounds the stream",
                    config.memory_mark,
                    size(used),
                    config.max_stream_len
                ),
                "redis-cli CONFIG SET maxmemory 2gb (and the same in redis.conf), or give REDIS_MEMORY_MARK a size",
            );
            return;
        }
        MemoryMark::Percent(percent) => max / 100 * u64::from(percent),
        MemoryMark::Bytes(bytes) => bytes,
    };
    if max > 0 && mark > max / 100 * 80 {
        findings.error(
            WHAT,
            format!(
                "REDIS_MEMORY_MARK={} is more than 80% of maxmemory ({}): Redis would refuse the pipelines' writes \
                 before the reader stops",
                config.memory_mark,
                size(max)
            ),
            "write REDIS_MEMORY_MARK=75%",
        );
    } else if used >= mark {
        findings.warning(
            WHAT,
            format!("{} in use, and the reader waits for room at {}", size(used), size(mark)),
            "raise maxmemory, or see what fills Redis: redis-cli --bigkeys",
        );
    } else {
        findings.ok(WHAT, format!("{} in use; the reader slows down at {}", size(used), size(mark)));
    }
}

/// Whether our user may do everything that the pipelines and the reader do.
async fn may_do_everything(
    config: &Config,
    keys: &Keys,
    connection: &mut Connection,
    findings: &mut Findings,
) -> StreamResult<bool> {
    const WHAT: &str = "rights";
    let who = permitted(server::who_am_i(connection).await);
    let who = who.ok().flatten().map_or_else(|| "this user".to_owned(), |name| format!("user {name}"));
    let Some(missing) = rights::missing(connection, keys).await? else {
        findings.error(
            WHAT,
            format!("{who} may not use MULTI and DISCARD, without which its rights cannot be tried"),
            "ACL SETUSER <user> +multi +exec +discard; docs/security.md has the whole rule",
        );
        return Ok(false);
    };
    let mut good = true;
    if !missing.commands.is_empty() {
        good = false;
        let upper: Vec<String> =
            missing.commands.iter().map(|command| command.to_uppercase().replace('|', " ")).collect();
        let rule: Vec<String> = missing.commands.iter().map(|command| format!("+{command}")).collect();
        findings.error(
            WHAT,
            format!("{who} may not use {}", upper.join(", ")),
            format!("ACL SETUSER <user> {}", rule.join(" ")),
        );
    }
    if !missing.keys.is_empty() {
        good = false;
        let rule: Vec<String> = missing.keys.iter().map(|key| format!("~{key}")).collect();
        findings.error(
            WHAT,
            format!("{who} may not read and write {}", missing.keys.join(", ")),
            format!("ACL SETUSER <user> {}", rule.join(" ")),
        );
    }
    if !missing.legacy_keys.is_empty() && config.legacy_status != Some(false) {
        let rule: Vec<String> = missing.legacy_keys.iter().map(|key| format!("~{key}")).collect();
        findings.warning(
            WHAT,
            format!(
                "{who} may not use {}, which the old application's pages read",
                missing.legacy_keys.join(", ")
            ),
            format!("ACL SETUSER <user> {}, or set LEGACY_STATUS=false", rule.join(" ")),
        );
    }
    if good {
        findings.ok(WHAT, format!("{who} may use all {} commands on all keys", rights::COMMANDS.len()));
    }
    Ok(good)
}

fn stream(config: &Config, report: &Report, findings: &mut Findings) {
    const WHAT: &str = "stream";
    let stream = &report.stream;
    if !stream.exists {
        findings.ok(WHAT, format!("{} does not exist yet: the start creates it with its group", stream.key));
    } else if stream.group_exists {
        let waiting =
            stream.waiting.map_or_else(|| "an unknown number".to_owned(), |count| count.to_string());
        findings.ok(
            WHAT,
            format!(
                "{} holds {} entries; in group {} {waiting} wait and {} are pending",
                stream.key, stream.length, stream.group, stream.pending
            ),
        );
        if let Some(oldest) = stream.oldest_waiting_seconds.filter(|oldest| *oldest > 60.0) {
            findings.warning(
                WHAT,
                format!("the oldest entry that is not finished came {} ago", rough(oldest)),
                "see that a worker runs; docs/operations.md, \"Growing queue\", says what to look at",
            );
        }
    } else {
        findings.warning(
            WHAT,
            format!(
                "{} holds {} entries and there is no group {}: nothing is trimmed until it exists",
                stream.key, stream.length, stream.group
            ),
            "the start creates it and reads from the beginning; if there should be one, correct REDIS_CONSUMER_GROUP",
        );
    }
    if stream.length >= config.max_stream_len {
        findings.warning(
            WHAT,
            format!("at its mark of {} entries: the reader waits for room", config.max_stream_len),
            "find out what holds the pipelines up, or raise REDIS_MAX_STREAM_LEN and Redis's memory with it",
        );
    }
    if stream.group_exists && !stream.trim_held_by.is_empty() && stream.trim_held_by != stream.group {
        findings.warning(
            "trim",
            format!(
                "group {} has acknowledged the least and holds the trim back: the stream only grows up to its mark",
                stream.trim_held_by
            ),
            format!(
                "let it catch up; if nothing reads it any more: redis-cli XGROUP DESTROY {} {}",
                stream.key, stream.trim_held_by
            ),
        );
    } else if stream.group_exists {
        findings.ok("trim", "held back by no other group");
    }
    match (&stream.relay, stream.cursor) {
        (Some(relay), Some(cursor)) if *relay == config.relay_url.relay() => {
            findings.ok("cursor", format!("{cursor} at {relay}"));
        }
        (Some(relay), Some(cursor)) => findings.warning(
            "cursor",
            format!(
                "{cursor} belongs to {relay}, and RELAY_URL names {}: its numbering differs, and the change is a gap",
                config.relay_url.relay()
            ),
            "keep RELAY_URL if you can; else accept the gap, which is counted",
        ),
        (None, Some(cursor)) => findings.note(
            "cursor",
            format!("{cursor}, written by another program, which does not record the relay"),
            "make sure that RELAY_URL names the relay that it read",
        ),
        (_, None) => findings.note(
            "cursor",
            "none yet: the reader starts with what the relay sends at that moment",
            "to take over from another reader set REDIS_CURSOR_KEY to its key",
        ),
    }
}

/// Gaps, and events that could not be used.
fn missing(report: &Report, refill: Option<Refill>, findings: &mut Findings) {
    const WHAT: &str = "missing";
    let missing = &report.missing;
    if let Some(refill) = refill {
        findings.warning(
            WHAT,
            format!(
                "PostgreSQL had lost acknowledged events; they are read again from {} to {}",
                refill.from, refill.until
            ),
            "let reader and worker run; the process is ready again when it is done",
        );
    }
    if let Some(gap) = &missing.last_gap {
        let size = gap.size().map(|size| format!(", up to {size} events")).unwrap_or_default();
        findings.warning(
            WHAT,
            format!("{} gaps, the last at {}{size}: {}", missing.gaps, gap.time, gap.reason),
            "what the relay no longer sends can only be read from the accounts' own servers",
        );
    }
    let lost: Vec<String> = missing
        .by_reason
        .iter()
        .filter(|(reason, count)| **count > 0 && *reason != "no_handle")
        .map(|(reason, count)| format!("{count} {}", reason.replace('_', " ")))
        .collect();
    if !lost.is_empty() {
        findings.note(
            WHAT,
            format!("of the relay's events could not be used: {}", lost.join(", ")),
            "records among them are dead letters: standpipe dead-letters list",
        );
    }
    if let Some(count) = missing.by_reason.get("no_handle") {
        findings.note(
            "handles",
            format!("{count} identities came without a handle: those accounts are shown as handle.invalid"),
            "today's relays send no handles; they would have to be looked up",
        );
    }
}

async fn dead_letters(
    config: &Config,
    keys: &Keys,
    report: &Report,
    connection: &mut Connection,
    findings: &mut Findings,
) -> StreamResult<()> {
    const WHAT: &str = "dead letters";
    let bytes = letters::bytes(connection, keys).await?;
    let budget = config.dead_letter_max_bytes;
    if report.dead_letters == 0 {
        findings.ok(WHAT, "none");
    } else if bytes / 9 >= budget / 10 {
        findings.error(
            WHAT,
            format!(
                "{} of them take {} of their budget of {}: entries that cannot be applied stay pending",
                report.dead_letters,
                size(bytes),
                size(budget)
            ),
            "standpipe dead-letters list, then retry or purge; or raise DEAD_LETTER_MAX_BYTES",
        );
    } else {
        findings.note(
            WHAT,
            format!("{} ({} of {})", report.dead_letters, size(bytes), size(budget)),
            "standpipe dead-letters list shows why; retry after a correction, or purge",
        );
    }
    Ok(())
}

/// Consumers whose entries have been idle for long.
fn consumers(
    config: &Config,
    report: &Report,
    pending: &[Pending],
    leased: &BTreeSet<&str>,
    findings: &mut Findings,
) {
    const WHAT: &str = "consumers";
    let has_lease = |name: &str| name.rsplit_once('-').is_some_and(|(id, _)| leased.contains(id));
    let left =
        |name: &str| pending.iter().any(|entry| entry.consumer == name && entry.idle > config.claim_idle);
    let dead: Vec<_> = report
        .consumers
        .iter()
        .filter(|consumer| left(&consumer.name) && !has_lease(&consumer.name))
        .collect();
    if dead.is_empty() {
        let at_work = match leased.len() {
            0 => "no standpipe process is running".to_owned(),
            1 => "1 standpipe process is running".to_owned(),
            count => format!("{count} standpipe processes are running"),
        };
        findings.ok(WHAT, format!("{} in the group, none of them dead; {at_work}", report.consumers.len()));
        return;
    }
    let names: Vec<String> = dead
        .iter()
        .map(|consumer| {
            format!(
                "{} ({} pending, idle for {})",
                consumer.name,
                consumer.pending,
                rough(consumer.idle_seconds)
            )
        })
        .collect();
    findings.warning(
        WHAT,
        format!("dead: {}", some_of(&names)),
        format!(
            "start a worker: it takes their entries over after CLAIM_IDLE ({}), or at once under their CONSUMER_ID; \
             never XGROUP DELCONSUMER, which loses them",
            humantime::format_duration(config.claim_idle)
        ),
    );
}

/// Pending entries that are no longer in the stream.
async fn dangling(
    keys: &Keys,
    pending: &[Pending],
    connection: &mut Connection,
    findings: &mut Findings,
) -> StreamResult<()> {
    const WHAT: &str = "pending entries";
    let gone: Vec<&String> =
        group::dangling(connection, keys, pending).await?.into_iter().map(|entry| &entry.id).collect();
    if gone.is_empty() {
        findings.ok(WHAT, "all of them are still in the stream");
    } else {
        findings.warning(
            WHAT,
            format!(
                "{} of {} are no longer in the stream: something else trims it or deletes from it ({})",
                gone.len(),
                pending.len(),
                some_of(&gone)
            ),
            "stop it (the old reader's MAXLEN, for example); a running worker sends the reader back for them",
        );
    }
    Ok(())
}
