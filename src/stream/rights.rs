//! The commands that this program sends, on which keys, and whether our user may use them.

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Value};

use super::{Keys, Stream};

/// Every command, as written in an ACL rule, with arguments that would run it. A test compares the list with the
/// sources. `$` marks the key that the command is used on.
///
/// The scripts' commands count like any other: the server checks them one by one against the user who called.
pub const COMMANDS: &[(&str, &[&str])] = &[
    ("del", &["$cursor"]),
    ("discard", &[]),
    ("evalsha", &["0000000000000000000000000000000000000000", "1", "$stream"]),
    ("exec", &[]),
    ("exists", &["$stream"]),
    ("get", &["$cursor"]),
    ("hdel", &["$watch", "field"]),
    ("hexists", &["$watch", "field"]),
    ("hget", &["$watch", "field"]),
    ("hgetall", &["$watch"]),
    ("hmget", &["$watch", "field"]),
    ("hincrby", &["$watch", "field", "0"]),
    ("hlen", &["$watch"]),
    ("hscan", &["$watch", "0"]),
    ("hset", &["$watch", "field", "value"]),
    ("hsetnx", &["$watch", "field", "value"]),
    ("incr", &["$lost"]),
    ("incrby", &["$bytes", "0"]),
    ("info", &[]),
    ("lpush", &["$gaps", "{}"]),
    ("lrange", &["$gaps", "0", "0"]),
    ("ltrim", &["$gaps", "0", "99"]),
    ("mget", &["$cursor", "$relay"]),
    ("multi", &[]),
    ("pexpire", &["$lease", "10000"]),
    ("pttl", &["$lease"]),
    ("rpush", &["$epochs", "0-1 0"]),
    ("script|load", &["return 0"]),
    ("set", &["$cursor", "0"]),
    ("time", &[]),
    ("xack", &["$stream", "group", "0-1"]),
    ("xadd", &["$stream", "*", "type", "commit"]),
    ("xautoclaim", &["$stream", "group", "consumer", "10000", "0-0"]),
    ("xclaim", &["$stream", "group", "consumer", "10000", "0-1", "JUSTID"]),
    ("xdel", &["$dead", "0-1"]),
    ("xgroup|create", &["$stream", "group", "0"]),
    ("xgroup|delconsumer", &["$stream", "group", "consumer"]),
    ("xgroup|setid", &["$stream", "group", "0"]),
    ("xinfo|consumers", &["$stream", "group"]),
    ("xinfo|groups", &["$stream"]),
    ("xinfo|stream", &["$stream"]),
    ("xlen", &["$stream"]),
    ("xpending", &["$stream", "group"]),
    ("xrange", &["$stream", "-", "+"]),
    ("xreadgroup", &["GROUP", "group", "consumer", "STREAMS", "$stream", ">"]),
    ("xrevrange", &["$dead", "+", "-"]),
    ("xtrim", &["$stream", "MINID", "0"]),
];

/// Commands that only some need, or that not every server has, so that no rule can name them everywhere. Without the right to
/// use them, there is another way.
pub const OPTIONAL: [&str; 2] = ["wait", "waitaof"];

/// The commands that begin and end a transaction, which cannot be tried inside one.
const BRACKETS: [&str; 3] = ["multi", "exec", "discard"];

/// What our user may not do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// As in [`COMMANDS`].
    pub commands: Vec<&'static str>,
    /// Keys that cannot be read or cannot be written.
    pub keys: Vec<String>,
    /// Keys of the old application's pages among them; see [`super::legacy`].
    pub legacy_keys: Vec<String>,
}

impl Stream {
    /// Tries every command on its keys, and changes nothing: the server checks the rights to a command when it queues
    /// it in a transaction, and the transaction is discarded. The server itself answers, for our own user, on every
    /// version; ACL DRYRUN would need an administrator's rights and Redis 7.
    ///
    /// `None` if the user may not begin and discard a transaction, so that nothing can be tried.
    ///
    /// # Errors
    ///
    /// The connection broke.
    pub async fn missing_rights(&mut self) -> RedisResult<Option<Missing>> {
        let Self { connection, keys } = self;
        if let Some(Refused::Command) = ask(connection, "multi", &[]).await? {
            return Ok(None);
        }
        let mut missing = Missing::default();
        for (command, words) in COMMANDS.iter().filter(|(command, _)| !BRACKETS.contains(command)) {
            let words: Vec<String> = words.iter().map(|word| named(keys, word)).collect();
            if ask(connection, command, &words).await? == Some(Refused::Command) {
                missing.commands.push(command);
            }
        }
        for key in keys.all() {
            if !may_use(connection, &key).await? {
                missing.keys.push(key);
            }
        }
        for key in super::legacy::KEYS {
            if !may_use(connection, key).await? {
                missing.legacy_keys.push((*key).to_owned());
            }
        }
        if ask(connection, "discard", &[]).await? == Some(Refused::Command) {
            // The server forgets it with the connection.
            return Ok(None);
        }
        // A refused command aborts the transaction, so nothing can be executed either.
        let _ = ask(connection, "multi", &[]).await?;
        let exec = ask(connection, "exec", &[]).await?;
        if exec == Some(Refused::Command) {
            missing.commands.push("exec");
        }
        Ok(Some(missing))
    }
}

/// Whether a key can be read and written. If the command itself is refused, nothing is known about the key.
async fn may_use(connection: &mut MultiplexedConnection, key: &str) -> RedisResult<bool> {
    let read = ask(connection, "get", &[key.to_owned()]).await?;
    let write = ask(connection, "set", &[key.to_owned(), "0".to_owned()]).await?;
    Ok(read != Some(Refused::Key) && write != Some(Refused::Key))
}

/// A probe's arguments, with the key filled in.
fn named(keys: &Keys, word: &str) -> String {
    match word {
        "$stream" => keys.stream.clone(),
        "$cursor" => keys.cursor.clone(),
        "$relay" => keys.relay.clone(),
        "$watch" => keys.watch.clone(),
        "$lease" => keys.lease.clone(),
        "$lost" => keys.lost.clone(),
        "$dead" => keys.dead.clone(),
        "$bytes" => keys.dead_bytes(),
        "$gaps" => keys.gaps.clone(),
        "$epochs" => keys.epochs.clone(),
        word => word.to_owned(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Command,
    Key,
}

async fn ask(
    connection: &mut MultiplexedConnection,
    command: &str,
    words: &[String],
) -> RedisResult<Option<Refused>> {
    let mut asked = redis::Cmd::new();
    for word in command.split('|') {
        asked.arg(word);
    }
    let Err(error) = asked.arg(words).query_async::<Value>(connection).await else { return Ok(None) };
    let says = |word: &str| error.detail().is_some_and(|detail| detail.contains(word));
    match error.code() {
        // "no permissions to run the 'x' command", "no permissions to access a key": the same words since Redis 6.
        Some("NOPERM") => Ok(Some(if says("to access") { Refused::Key } else { Refused::Command })),
        // A refused EXEC has an error of its own, and the transaction is over.
        Some("EXECABORT") if says("NOPERM") => Ok(Some(Refused::Command)),
        _ if error.is_io_error() || error.is_connection_dropped() => Err(error),
        // Any other error comes after the check of the rights.
        _ => Ok(None),
    }
}
