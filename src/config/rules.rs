//! Combinations of settings that are refused or cause a warning.

use std::time::Duration;

use super::read::{Reading, shown};
use super::settings::Parsed;
use super::{Backfill, Config, RelayUrl, Role, VerifyMode};

/// Reports unsafe combinations.
pub(super) fn refuse(parsed: &Parsed, role: Role, read: &mut Reading) {
    if role.has_pipelines() && matches!(parsed.database_url, Some(None)) && !read.is_wrong("DATABASE_URL") {
        read.problem(
            "DATABASE_URL",
            "is not set, but required here; write postgres://user:password@host:5432/database".to_owned(),
        );
    }
    let amqp = ("RabbitMQ", "amqp", cfg!(feature = "amqp"));
    let kafka = ("Kafka", "kafka", cfg!(feature = "kafka"));
    for (name, is_set, (broker, feature, is_built)) in [
        ("AMQP_ORIGIN_URL", matches!(parsed.amqp_origin, Some(Some(_))), amqp),
        ("AMQP_OUTPUT_URL", matches!(parsed.amqp_output, Some(Some(_))), amqp),
        ("KAFKA_ORIGIN_URL", matches!(parsed.kafka_origin, Some(Some(_))), kafka),
        ("KAFKA_OUTPUT_URL", matches!(parsed.kafka_output, Some(Some(_))), kafka),
    ] {
        if is_set && !is_built {
            let what = format!(
                "is set, but this program was built without {broker} support (Cargo feature {feature}); use a build that has it"
            );
            read.problem(name, what);
        }
    }
    if let (Some(results), Some(limit)) = (parsed.handler_results, parsed.handler_timeout)
        && results <= limit
    {
        let what = "is not longer than HANDLER_TIMEOUT: a result could be forgotten while its message is still being removed; write 30d";
        read.problem("HANDLER_RESULTS", what.to_owned());
    }
    let is_jetstream = parsed.relay_url.as_ref().is_some_and(RelayUrl::is_jetstream);
    if is_jetstream && matches!(parsed.backfill, Some(Some(Backfill::All | Backfill::Collection(_)))) {
        read.problem(
            "BACKFILL",
            "asks for a list of accounts, and RELAY_URL is a Jetstream, which has none; write the address of a relay"
                .to_owned(),
        );
    }
    if matches!(parsed.backfill, Some(Some(Backfill::Seen))) && matches!(parsed.wanted_dids, Some(Some(_))) {
        read.problem(
            "BACKFILL",
            "is seen, which fetches every account that the wanted ones mention, and those that these mention; with WANTED_DIDS, use \
             standpipe repos add"
                .to_owned(),
        );
    }
    if let (Some(stream), Some(cursor)) = (&parsed.stream_key, &parsed.cursor_key) {
        refuse_shared_keys(stream, cursor, read);
    }
}

/// Two uses of one Redis key would destroy each other: SET silently replaces a stream.
fn refuse_shared_keys(stream: &str, cursor: &str, read: &mut Reading) {
    let clash = if cursor == stream {
        Some((
            "REDIS_CURSOR_KEY",
            "is the same key as REDIS_STREAM_KEY: storing the cursor would replace the stream",
        ))
    } else if cursor.strip_prefix(stream) == Some(":dead") {
        Some(("REDIS_CURSOR_KEY", "is the key of the dead letters (REDIS_STREAM_KEY + \":dead\")"))
    } else if stream.strip_prefix(cursor) == Some(":relay") {
        Some((
            "REDIS_STREAM_KEY",
            "is the key where the relay's host is kept (REDIS_CURSOR_KEY + \":relay\")",
        ))
    } else {
        None
    };
    if let Some((variable, why)) = clash {
        let value = if variable == "REDIS_CURSOR_KEY" { cursor } else { stream };
        read.problem(variable, format!("{} {why}; choose another key", shown(value)));
    }
}

/// Settings that work, but probably not as intended.
pub(super) fn warnings(config: &Config, role: Role) -> Vec<String> {
    let mut warnings = Vec::new();
    if config.relay_ca.is_some() && !config.relay_url.is_tls() {
        warnings.push("RELAY_CA_FILE is set, and RELAY_URL does not use TLS: write wss://".to_owned());
    }
    if config.redis_ca.is_some() && !config.redis_url.is_tls() {
        warnings.push("REDIS_CA_FILE is set, and REDIS_URL does not use TLS: write rediss://".to_owned());
    }
    if config.relay_url.is_jetstream() && config.verify != VerifyMode::Off {
        warnings.push(format!(
            "VERIFY is {}, and RELAY_URL is a Jetstream, whose events carry no signatures: nothing is verified; write VERIFY=off",
            config.verify
        ));
    }
    if !role.has_pipelines() {
        return warnings;
    }
    let Config { parallel_consumers, batch_size, db_pool_size, max_stream_len, .. } = config;
    if *batch_size == 10 {
        warnings.push(
            "BATCH_SIZE is 10, the older workers' default, which costs throughput here: unset it or use 200"
                .to_owned(),
        );
    }
    if parallel_consumers > db_pool_size {
        warnings.push(format!(
            "PARALLEL_CONSUMERS is {parallel_consumers} and DB_POOL_SIZE only {db_pool_size}: \
             pipelines will wait for connections"
        ));
    } else if config.backfill.is_some() && config.repair_concurrency == 0 {
        warnings.push(
            "BACKFILL has no effect with REPAIR_CONCURRENCY=0: accounts are queued and not fetched"
                .to_owned(),
        );
    } else if config.repair_concurrency > 0 && config.repairers() == 0 {
        warnings.push(format!(
            "DB_POOL_SIZE is {db_pool_size}, which leaves no connection for repairs: repositories to repair stay queued; \
             write {} or more, or REPAIR_CONCURRENCY=0",
            parallel_consumers + 3
        ));
    }
    let in_hand = (*parallel_consumers as u64).saturating_mul(*batch_size as u64);
    if in_hand > *max_stream_len {
        warnings.push(format!(
            "REDIS_MAX_STREAM_LEN is {max_stream_len}, less than one batch for each pipeline ({in_hand} entries): \
             some pipelines will stay idle"
        ));
    }
    // Relays replay up to three days. Of what is older than the tombstones, nobody knows whether it was deleted.
    if config.tombstone_retention < Duration::from_hours(72) {
        warnings.push(format!(
            "TOMBSTONE_RETENTION is {}, less than the three days that a relay can replay: \
             records that were deleted will become dead letters when it does",
            humantime::format_duration(config.tombstone_retention)
        ));
    }
    warnings
}
