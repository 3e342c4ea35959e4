//! The server's version, eviction, persistence and memory.

use crate::config::{Config, MemoryMark};
use crate::doctor::{Findings, rough, size};
use crate::stream::{Stream, StreamResult};

/// The reply of INFO.
#[derive(Clone, Copy)]
pub(super) struct Info<'a>(pub &'a str);

impl<'a> Info<'a> {
    pub fn text(self, name: &str) -> &'a str {
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
pub(super) struct Settings {
    append_fsync: Option<String>,
    save: Option<String>,
}

impl Settings {
    pub async fn read(connection: &mut Stream) -> StreamResult<Self> {
        Ok(Self {
            append_fsync: connection.setting("appendfsync").await?,
            save: connection.setting("save").await?,
        })
    }
}

pub(super) fn version(info: Info<'_>, findings: &mut Findings) {
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
            format!("{name}: it neither counts waiting entries nor reports the ids of removed ones"),
            "Redis 7 and Valkey do both",
        );
    } else {
        findings.ok("version", name);
    }
    if info.text("role") == "slave" {
        findings.error("role", "it is a replica and accepts no writes", "point REDIS_URL at the primary");
    }
    if info.text("loading") == "1" {
        findings.warning("role", "it is loading its data", "wait until it is done");
    }
}

pub(super) fn eviction(info: Info<'_>, findings: &mut Findings) {
    match info.text("maxmemory_policy") {
        "noeviction" => findings.ok("eviction", "noeviction: nothing is evicted"),
        policy if policy.starts_with("volatile-") => findings.ok(
            "eviction",
            format!("{policy}: only leases can be evicted, and they are re-acquired; noeviction is better"),
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

pub(super) fn persistence(info: Info<'_>, settings: &Settings, findings: &mut Findings) {
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
                "append-only file, flushed every second: a crash of the machine loses up to two seconds of stream and \
                 cursor together, and the reader re-reads them from the relay",
            ),
            Some(other) => findings.warning(
                WHAT,
                format!(
                    "append-only file, flushed when the kernel decides (appendfsync {other}): a crash of the machine \
                     loses half a minute or more, including dead letters; the reader re-reads the rest from the relay"
                ),
                "redis-cli CONFIG SET appendfsync everysec, and the same in redis.conf",
            ),
            None => findings.note(
                WHAT,
                "append-only file; how often it is flushed is unknown, because our user may not use CONFIG GET",
                "make sure that redis.conf has appendfsync everysec or always",
            ),
        }
    } else {
        let found = if settings.save.as_deref() == Some("") {
            "nothing is persisted: a restart of Redis loses the stream, the cursor and the dead letters; the reader \
             then starts from the relay's live position, and everything before that is a gap"
                .to_owned()
        } else {
            let saved = info.number("rdb_last_save_time") as f64;
            let age = crate::time::now_ms() as f64 / 1000.0 - saved;
            format!(
                "snapshots only, no append-only file: a crash goes back to the last one, {} and {} changes ago; the \
                 reader re-reads from that cursor what the relay still has, and dead letters since then are lost",
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
            "check whether its disk is full",
        );
    }
    if info.text("rdb_last_bgsave_status") == "err" {
        findings.error(
            WHAT,
            "the last snapshot failed: unless stop-writes-on-bgsave-error is off, Redis refuses all writes",
            "check Redis's log, whether its disk is full, and whether it has too little memory to fork",
        );
    }
}

pub(super) fn memory(config: &Config, info: Info<'_>, findings: &mut Findings) {
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
                "redis-cli CONFIG SET maxmemory 2gb (and the same in redis.conf), or set REDIS_MEMORY_MARK to a size",
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
            "set REDIS_MEMORY_MARK=75%",
        );
    } else if used >= mark {
        findings.warning(
            WHAT,
            format!("{} in use, and the reader waits for room at {}", size(used), size(mark)),
            "raise maxmemory, or find out what fills Redis: redis-cli --bigkeys",
        );
    } else {
        findings.ok(WHAT, format!("{} in use; the reader slows down at {}", size(used), size(mark)));
    }
}
