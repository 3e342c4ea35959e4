//! What has been applied, for others to read: in the order of the stream, and only once it is in the tables.
//!
//! - `jetstream`: an entry as the messages of a Jetstream, and a subscriber's filter
//! - `messages`: settled entries as messages, without what accounts forbid to collect
//! - `feed`: the settled entries, read once for all subscribers
//! - `amqp`: the same messages to a RabbitMQ exchange

#[cfg(feature = "amqp")]
pub mod amqp;
pub mod feed;
pub mod jetstream;
pub mod messages;
