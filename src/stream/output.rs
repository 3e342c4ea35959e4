//! The position of an output: the last-delivered id of its own consumer group. The janitor trims nothing after it.

use std::sync::LazyLock;

use redis::{RedisResult, Script};

use super::Stream;
use super::lease::{self, Lease};
use super::settled::Place;
use crate::event::EntryId;

/// An output with a group of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// RabbitMQ.
    Amqp,
    /// Kafka.
    Kafka,
}

impl Output {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Amqp, Self::Kafka];

    /// Its name in metrics and status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amqp => "rabbitmq",
            Self::Kafka => "kafka",
        }
    }

    /// Its group. The janitor recognises outputs by its prefix.
    #[must_use]
    pub fn group(self) -> String {
        format!("out:{}", self.name())
    }
}

impl Stream {
    /// An output's position; a new output begins with the oldest entry. `None` while there is no stream.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn output_place(&mut self, output: Output) -> RedisResult<Option<Place>> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
            Script::new(concat!(include_str!("set_output.lua"), include_str!("output_place.lua")))
        });
        let Self { connection, keys } = self;
        let last: String =
            SCRIPT.key(&keys.stream).key(&keys.watch).arg(output.group()).invoke_async(connection).await?;
        Ok(last.parse().ok().map(place))
    }

    /// Advances an output past the entries that it has published; `false` if its lease is no longer ours, or somebody has set it back.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn advance_output(
        &mut self,
        output: Output,
        token: &str,
        from: EntryId,
        to: EntryId,
        entries: usize,
    ) -> RedisResult<bool> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
            Script::new(concat!(include_str!("set_output.lua"), include_str!("advance_output.lua")))
        });
        let Self { connection, keys } = self;
        SCRIPT
            .key(&keys.stream)
            .key(keys.of(Lease::Output(output)))
            .key(&keys.watch)
            .arg(output.group())
            .arg(token)
            .arg(from.to_string())
            .arg(to.to_string())
            .arg(entries)
            .arg(lease::LIFE.as_millis() as u64)
            .invoke_async(connection)
            .await
    }
}

/// An id in a group: an entry that was there, or the very beginning.
fn place(id: EntryId) -> Place {
    if id == EntryId::default() { Place::Behind(id) } else { Place::Read(id) }
}
