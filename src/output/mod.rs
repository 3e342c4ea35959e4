//! What has been applied, for others to read: in the order of the stream, and only once it is in the tables.
//!
//! - `jetstream`, `events`: an entry as the messages of a Jetstream, versions 1 and 2; `filter`: what a subscriber wants
//! - `messages`: settled entries as messages, without what accounts forbid to collect
//! - `feed`: the settled entries, read once for all subscribers
//! - `publish`: the same messages to a broker
//! - `amqp`, `kafka`: a RabbitMQ exchange, a Kafka topic

#[cfg(feature = "amqp")]
mod amqp;
pub mod events;
pub mod feed;
pub mod filter;
pub mod jetstream;
#[cfg(feature = "kafka")]
mod kafka;
pub mod messages;
#[cfg(any(feature = "amqp", feature = "kafka"))]
pub mod publish;
