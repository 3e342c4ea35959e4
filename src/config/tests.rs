//! What the configuration accepts, refuses and reports.

use std::ffi::OsString;
use std::time::Duration;

use super::read::edits;
use super::unit::{format_size, parse_size};
use super::url::{SUBSCRIBE_PATH, redacted};
use super::*;

fn read(vars: &[(&str, &str)]) -> Result<(Config, Vec<String>), ConfigError> {
    from_env(vars.iter().copied(), Role::Tool)
}

/// The only problem that one variable with this value has.
fn problem(name: &str, value: &str) -> String {
    let error = read(&[(name, value)]).expect_err("the value should be refused");
    assert_eq!(error.problems.len(), 1, "{error}");
    error.to_string()
}

#[test]
fn an_empty_environment_gives_the_defaults_and_no_warning() {
    let (config, warnings) = read(&[("HOSTNAME", "tower")]).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(config.consumer_id, "tower");
    assert_eq!(config.consumer_name(3), "tower-3");
    assert_eq!(config.relay_url.expose(), "wss://bsky.network/xrpc/com.atproto.sync.subscribeRepos");
    assert_eq!(config.relay_url.relay(), "bsky.network");
    assert_eq!(config.memory_mark, MemoryMark::Percent(75));
    assert_eq!(config.relay_idle_timeout, Some(Duration::from_mins(1)));
    assert_eq!(config.dead_letter_max_bytes, 256 << 20);
    assert_eq!(config.http_addr, Some(([127, 0, 0, 1], 9464).into()));
    assert_eq!(config.dead_letter_key(), "firehose:events:dead");
    assert_eq!(config.cursor_relay_key(), "firehose:cursor:relay");
}

#[test]
fn every_variable_is_described_in_the_order_of_the_table() {
    let (config, _) = read(&[]).unwrap();
    let described: Vec<_> = config.values().into_iter().map(|(name, _)| name).collect();
    let known: Vec<_> = VARIABLES.iter().map(|v| v.name).collect();
    assert_eq!(described, known);
}

#[test]
fn every_variable_changes_the_configuration() {
    let other = |name: &str| match name {
        "RELAY_URL" => "ws://localhost:7000",
        "REDIS_URL" => "redis://elsewhere",
        "DATABASE_URL" => "postgres://localhost/x",
        "REDIS_MEMORY_MARK" => "64MiB",
        "TRANSACTION" => "batch",
        "COLLECTIONS" => "*",
        "WANTED_DIDS" => "tracked",
        "ON_FUTURE_CURSOR" => "live",
        "VERIFY" => "log",
        "PLC_URL" => "http://localhost",
        "ALLOW_PRIVATE_ADDRESSES" => "yes",
        "AUTO_MIGRATE" | "NOTIFICATIONS" | "LEGACY_STATUS" => "no",
        "DEAD_LETTER_MAX_BYTES" => "1GB",
        "HTTP_ADDR" | "RELAY_IDLE_TIMEOUT" => "off",
        "ADMIN_TOKEN" | "SUBSCRIBE_TOKEN" | "INGEST_TOKEN" => "sixteen-and-more-characters",
        "AMQP_ORIGIN_URL" => "amqp://host?queue=q",
        "KAFKA_ORIGIN_URL" | "KAFKA_OUTPUT_URL" => "kafka://host/topic",
        "AMQP_OUTPUT_URL" => "amqp://host?exchange=e",
        "STREAM_KEEP" => "2GiB",
        "SUBSCRIBE" => "on",
        "RELAY_CA_FILE" | "REDIS_CA_FILE" | "PGSSLROOTCERT" => {
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/ca.pem")
        }
        "LOG_LEVEL" => "warn",
        "LOG_FORMAT" => "JSON",
        "OUT_MAX_LAG"
        | "NOTIFY_WITHIN"
        | "CLAIM_IDLE"
        | "DRAIN_TIMEOUT"
        | "TOMBSTONE_RETENTION"
        | "DB_STATEMENT_TIMEOUT"
        | "HANDLER_TIMEOUT"
        | "HANDLER_RESULTS" => "77m",
        "REPAIR_CONCURRENCY" | "HANDLER_PIPELINES" | "HANDLER_ATTEMPTS" => "7",
        "BACKFILL" => "collection:app.bsky.feed.post",
        "MAX_ATTEMPTS"
        | "REDIS_MAX_STREAM_LEN"
        | "PARALLEL_CONSUMERS"
        | "BATCH_SIZE"
        | "DB_POOL_SIZE"
        | "SUBSCRIBE_CONNECTIONS" => "777",
        _ => "other",
    };
    let defaults = read(&[]).unwrap().0.describe();
    for variable in VARIABLES {
        let (config, _) = read(&[(variable.name, other(variable.name))]).unwrap();
        assert_ne!(config.describe(), defaults, "{} has no effect", variable.name);
    }
}

#[test]
fn what_is_kept_is_a_time_or_a_size() {
    let keeps = |value: &str| read(&[("STREAM_KEEP", value)]).unwrap().0.keeps();
    assert_eq!(keeps("0"), None);
    assert_eq!(keeps("1h"), Some(StreamKeep::Time(Duration::from_hours(1))));
    assert_eq!(keeps("2GiB"), Some(StreamKeep::Bytes(2 << 30)));
    for wrong in ["5s", "100", "1KiB", "long", "off"] {
        assert!(
            problem("STREAM_KEEP", wrong).contains("write a time such as 1h, a size such as 2GiB, or 0"),
            "{wrong}"
        );
    }
    // Subscribers need some of it.
    let (config, _) = read(&[("SUBSCRIBE", "on")]).unwrap();
    assert_eq!(config.keeps(), Some(StreamKeep::Time(Duration::from_mins(10))));
}

#[test]
fn an_empty_or_blank_value_counts_as_unset() {
    let (config, _) = read(&[("PARALLEL_CONSUMERS", ""), ("HTTP_ADDR", " \r"), ("RUST_LOG", "")]).unwrap();
    assert_eq!(config.parallel_consumers, 5);
    assert!(config.http_addr.is_some());
    assert_eq!(config.rust_log, None);
}

#[test]
fn each_invalid_value_is_reported_with_a_correction() {
    for (name, value, message) in [
        ("CLAIM_IDLE", "30", "CLAIM_IDLE: \"30\" has no unit; 30 what? write 30s, or use m, h or d"),
        (
            "DEAD_LETTER_MAX_BYTES",
            "512",
            "DEAD_LETTER_MAX_BYTES: \"512\" has no unit; 512 what? write 512B or 512MiB",
        ),
        ("BATCH_SIZE", "0", "BATCH_SIZE: \"0\" is out of range; write a whole number from 1 to 10000"),
        ("MAX_ATTEMPTS", "-1", "MAX_ATTEMPTS: \"-1\" is not a usable whole number; write one from 1 to 1000"),
        (
            "TRANSACTION",
            "batches",
            "TRANSACTION: \"batches\" is not a known value; write one of event, batch",
        ),
        (
            "LOG_LEVEL",
            "TRACE",
            "LOG_LEVEL: \"TRACE\" is not a known value; write one of DEBUG, INFO, WARNING, ERROR",
        ),
        ("AUTO_MIGRATE", "maybe", "AUTO_MIGRATE: \"maybe\" is neither yes nor no; write true or false"),
    ] {
        assert_eq!(problem(name, value), message);
    }
}

#[test]
fn unsafe_values_are_refused_with_the_reason() {
    assert!(problem("CLAIM_IDLE", "9s").contains("work that is still running"));
    assert!(problem("DRAIN_TIMEOUT", "0").contains("cut off work in progress"));
    assert!(problem("DRAIN_TIMEOUT", "0s").contains("cut off work in progress"));
    assert!(problem("DB_STATEMENT_TIMEOUT", "0").contains("means no limit"));
    assert!(problem("REDIS_MEMORY_MARK", "81%").contains("more than 80%"));
    assert!(problem("REDIS_CURSOR_KEY", "firehose:events").contains("would replace the stream"));
    assert!(problem("REDIS_CURSOR_KEY", "firehose:events:dead").contains("dead letters"));
    assert!(problem("REDIS_STREAM_KEY", "firehose:cursor:relay").contains("relay's host"));
    assert!(problem("TOMBSTONE_RETENTION", "0d").contains("deleted record"));
    assert!(problem("DRAIN_TIMEOUT", "999999y").contains("ten years"));
}

#[test]
fn a_worker_needs_a_database_and_the_others_do_not() {
    let none: [(&str, &str); 0] = [];
    for role in [Role::All, Role::Worker] {
        let error = from_env(none, role).unwrap_err();
        assert!(error.to_string().starts_with("DATABASE_URL: is not set"), "{error}");
    }
    for role in [Role::Reader, Role::Tool] {
        assert!(from_env(none, role).unwrap().0.database_url.is_none());
    }
}

#[test]
fn a_relay_url_keeps_its_path_and_is_named_by_host_and_port() {
    let url = |text| RelayUrl::parse(text).ok().unwrap();
    assert_eq!(url("ws://localhost:7000/").expose(), format!("ws://localhost:7000{SUBSCRIBE_PATH}"));
    assert_eq!(url("ws://localhost:7000").relay(), "localhost:7000");
    assert_eq!(url("wss://Relay.Example:443/firehose").expose(), "wss://relay.example/firehose");
    for wrong in ["https://bsky.network", "bsky.network", "bsky.network:443", "wss://", "wss://x/?cursor=3"] {
        assert!(RelayUrl::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn redis_urls_name_hosts_or_unix_sockets() {
    for right in [
        "redis://localhost",
        "rediss://user:p%40ss@[::1]:6380/3",
        "rediss://cache.example/#insecure",
        "unix:///run/redis.sock?db=1&pass=x",
        "redis+unix:///run/redis.sock",
    ] {
        assert!(RedisUrl::parse(right).is_ok(), "{right}");
    }
    for wrong in [
        "localhost:6379",
        "http://localhost",
        "redis://",
        "redis://h/abc",
        "unix://run/redis.sock",
        "unix://",
    ] {
        assert!(RedisUrl::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn database_urls_follow_libpq_syntax() {
    for right in [
        "postgres://localhost/app",
        "postgresql://user:p%40ss@h1:5432,h2:5433/app?sslmode=verify-full",
        "postgresql://user@/app?host=/run/postgresql",
        "postgres://user:a/b?c@[::1]:5432/app",
        "postgres://%2Frun%2Fpostgresql/app",
    ] {
        assert!(DatabaseUrl::parse(right).is_ok(), "{right}");
    }
    for mode in DatabaseUrl::SSL_MODES {
        assert!(DatabaseUrl::parse(&format!("postgres://h/d?sslmode={mode}")).is_ok());
    }
    for wrong in [
        "host=localhost user=app",
        "mysql://localhost/app",
        "postgres:///app",
        "postgres://user:hunter2/app",
        "postgres://user:p@ss@host/app",
        "postgres://h/d?sslmode=verify_full",
        "postgres://h:0/d",
    ] {
        assert!(DatabaseUrl::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn redacted_urls_never_contain_the_password() {
    for (url, expected) in [
        ("redis://:hunter2@h:6379/0", "redis://:***@h:6379/0"),
        ("redis://hunter2@h", "redis://***@h"),
        ("postgres://u:hunter2@h/d?sslmode=require", "postgres://u:***@h/d?sslmode=require"),
        ("postgres://u:x@hunter2@h/d", "postgres://u:***@h/d"),
        ("postgres://u:x/hunter2@h/d", "postgres://***"),
        ("postgres://u:x?a=hunter2@h/d", "postgres://***"),
        ("postgres://u@h/d?PASSWORD=hunter2#hunter2", "postgres://u@h/d?PASSWORD=***"),
        ("postgres://h/d?p%61ssword=hunter2&a=b", "postgres://h/d?p%61ssword=***&a=b"),
        ("unix:///run/r.sock?db=1&pass=hunter2", "unix:///run/r.sock?db=1&pass=***"),
        ("postgres://h/d?hunter2", "postgres://h/d?***"),
        ("hunter2", "***"),
    ] {
        assert_eq!(redacted(url), expected);
    }
}

#[test]
fn collections_are_names_wildcards_or_all() {
    let keeps = |list, name| Collections::parse(list).ok().unwrap().keeps(name);
    assert!(keeps("app.bsky.*,com.example.thing", "app.bsky.feed.post"));
    assert!(keeps("app.bsky.*, com.example.thing,", "com.example.thing"));
    assert!(!keeps("app.bsky.*", "app.bskyx.feed.post"));
    assert!(!keeps("app.bsky.feed.post", "app.bsky.feed.postgate"));
    assert!(keeps("*", "anything.at.all"));
    for wrong in
        ["app.bsky.feed.", "post", "app.bsky*", "*.bsky", ".*", "app..bsky.*", "app.bsky.feed.1post", ","]
    {
        assert!(Collections::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn sizes_have_units() {
    for (text, bytes) in [("512MiB", 512 << 20), ("1GB", 1_000_000_000), ("4096B", 4096), ("1 kib", 1024)] {
        assert_eq!(parse_size(text, 1).ok(), Some(bytes));
    }
    for wrong in ["MiB", "1.5GiB", "-1B", "1M", "0B", "99999999999GiB", "18446744073709551615B"] {
        assert!(parse_size(wrong, 1).is_err(), "{wrong}");
    }
    assert_eq!(format_size(256 << 20), "256MiB");
    assert_eq!(format_size(1_000_001), "1000001B");
}

#[test]
fn a_misspelt_name_is_pointed_out_without_its_value() {
    let (_, warnings) = read(&[
        ("PARALEL_CONSUMERS", "hunter2"),
        ("REDIS_URI", "redis://:hunter2@h"),
        ("relay_url", "wss://x"),
        ("REDIS_SSL", "1"),
        ("PATH", "/bin"),
        ("HTTP_PROXY", "x"),
        ("REDIS_HOST", "x"),
    ])
    .unwrap();
    assert_eq!(
        warnings,
        [
            "PARALEL_CONSUMERS is not a variable of standpipe and is ignored: did you mean PARALLEL_CONSUMERS?",
            "REDIS_URI is not a variable of standpipe and is ignored: did you mean REDIS_URL?",
            "relay_url is not a variable of standpipe and is ignored: did you mean RELAY_URL?",
        ]
    );
}

#[test]
fn a_misspelt_name_is_pointed_out_alongside_an_error() {
    let error = read(&[("BATCH_SIZE", "many"), ("BATCH_SIZES", "10")]).unwrap_err();
    assert_eq!(error.problems.len(), 1, "{error:?}");
    assert!(
        error.warnings.len() == 1 && error.warnings[0].ends_with("did you mean BATCH_SIZE?"),
        "{error:?}"
    );
}

#[test]
fn edit_distance_counts_a_swap_as_one() {
    for (a, b, distance) in
        [("", "abc", 3), ("abc", "acb", 1), ("abcd", "abxcd", 1), ("kitten", "sitting", 3)]
    {
        assert_eq!(edits(a.as_bytes(), b.as_bytes()), distance, "{a} {b}");
        assert_eq!(edits(b.as_bytes(), a.as_bytes()), distance, "{b} {a}");
    }
}

#[test]
fn values_that_work_but_look_like_mistakes_are_warned_about() {
    let vars = [
        ("DATABASE_URL", "postgres://h/d"),
        ("BATCH_SIZE", "10"),
        ("PARALLEL_CONSUMERS", "21"),
        ("TOMBSTONE_RETENTION", "1h"),
        ("REDIS_MAX_STREAM_LEN", "100"),
        // A container's own name is a good one: it stays the same over restarts.
        ("HOSTNAME", "0123456789ab"),
    ];
    let (_, warnings) = from_env(vars, Role::Worker).unwrap();
    let about = ["BATCH_SIZE", "PARALLEL_CONSUMERS", "REDIS_MAX_STREAM_LEN", "TOMBSTONE_RETENTION"];
    assert_eq!(warnings.len(), about.len(), "{warnings:?}");
    for (warning, name) in warnings.iter().zip(about) {
        assert!(warning.starts_with(name), "{warning}");
    }
    assert!(from_env(vars, Role::Reader).unwrap().1.is_empty());
}

#[cfg(unix)]
#[test]
fn a_non_utf8_value_is_reported_only_for_our_own_variables() {
    use std::os::unix::ffi::OsStringExt;
    let broken = || OsString::from_vec(vec![b'x', 0xff]);
    let vars = [("DATABASE_URL", broken()), ("SOMETHING_ELSE", broken())];
    let error = from_env(vars, Role::Worker).unwrap_err();
    assert_eq!(error.problems.len(), 1, "{error}");
    assert!(error.to_string().starts_with("DATABASE_URL: is not valid UTF-8"), "{error}");
}

#[test]
fn a_secret_in_the_wrong_variable_is_not_shown() {
    // These take any text, so a foreign URL is a valid value of theirs.
    let any = ["RUST_LOG", "ADMIN_TOKEN", "SUBSCRIBE_TOKEN", "INGEST_TOKEN"];
    for name in VARIABLES.iter().map(|v| v.name).filter(|name| !any.contains(name)) {
        if let Err(error) = read(&[(name, "mongodb://root:hunter2@db")]) {
            assert!(!error.to_string().contains("hunter2"), "{error}");
        } else {
            panic!("{name} accepts a foreign URL");
        }
    }
}

#[test]
fn quotation_marks_left_over_from_an_env_file_are_pointed_out() {
    assert_eq!(
        problem("REDIS_URL", "\"redis://h\""),
        "REDIS_URL: has quotation marks around it; remove them"
    );
    assert!(problem("REDIS_STREAM_KEY", "'events'").contains("quotation marks"));
}

#[test]
fn an_amqp_url_is_that_of_rabbitmq_with_our_parameters() {
    let origin = |value: &str| read(&[("AMQP_ORIGIN_URL", value)]).unwrap().0.amqp_origin.unwrap();
    let plain = origin("amqp://host?queue=q");
    assert_eq!((plain.server.host(), plain.server.port()), ("host".to_owned(), 5672));
    assert_eq!((plain.server.user(), plain.server.password()), ("guest".to_owned(), "guest".to_owned()));
    assert_eq!((plain.server.vhost(), plain.queue.as_str(), plain.prefetch), ("/".to_owned(), "q", 500));
    let full = origin("amqps://a%40b:p%2Fw%3F@[::1]:1/v%2Fh?prefetch=7&queue=my%20queue");
    assert_eq!((full.server.host(), full.server.port(), full.server.is_tls()), ("::1".to_owned(), 1, true));
    assert_eq!((full.server.user(), full.server.password()), ("a@b".to_owned(), "p/w?".to_owned()));
    assert_eq!((full.server.vhost(), full.queue.as_str(), full.prefetch), ("v/h".to_owned(), "my queue", 7));
    assert!(full.to_string().starts_with("amqps://a%40b:***@[::1]:1/v%2Fh?"), "{full}");
    assert!(!format!("{full:?}").contains("p%2Fw"), "{full:?}");
    for (value, says) in [
        ("host?queue=q", "not a URL"),
        ("http://host?queue=q", "neither amqp://"),
        ("amqp://host", "has no queue"),
        ("amqp://host?queue=", "1 to 255 bytes"),
        ("amqp://host?queue=q&prefetch=0", "not 1 to 10000"),
        ("amqp://host?queue=q&queue=r", "has queue twice"),
        ("amqp://host?queue=q&exchange=e", "unknown parameter exchange"),
        ("amqp://host/a/b?queue=q", "write %2F"),
        ("amqp://host?queue=q&cacertfile=/nowhere", "cannot be read"),
    ] {
        let problem = problem("AMQP_ORIGIN_URL", value);
        assert!(problem.contains(says), "{value}: {problem}");
    }
    let output = |value: &str| read(&[("AMQP_OUTPUT_URL", value)]).unwrap().0.amqp_output.unwrap();
    assert_eq!(output("amqp://host?exchange=e").key, RoutingKey::Did);
    let by_collection = output("amqp://u:secret@host?exchange=e&key=collection");
    assert_eq!(by_collection.key, RoutingKey::Collection);
    assert_eq!(by_collection.to_string(), "amqp://u:***@host?exchange=e&key=collection");
    assert!(
        problem("AMQP_OUTPUT_URL", "amqp://host?exchange=e&key=rkey").contains("neither did nor collection")
    );
    let lag = |value: &str| read(&[("OUT_MAX_LAG", value)]).unwrap().0.out_max_lag;
    assert_eq!((lag("hold"), lag("6h")), (None, Some(Duration::from_hours(6))));
    assert!(problem("OUT_MAX_LAG", "1s").contains("write 10s or more, or hold"));
}
