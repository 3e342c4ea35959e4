//! A RabbitMQ exchange.

use super::jetstream::Message;
use super::publish::Broker;
use crate::amqp::{AmqpError, Publisher};
use crate::config::{AmqpOutput, RoutingKey};
use crate::event::Outgoing;
use crate::stream::output::Output;

impl Broker for AmqpOutput {
    const OUTPUT: Output = Output::Amqp;
    const NAME: &'static str = "RabbitMQ";
    type Error = AmqpError;
    type Publisher = Publisher;

    fn target(&self) -> (String, String) {
        (self.exchange.clone(), self.server.host())
    }

    fn key(&self, message: &Message) -> String {
        match self.key {
            RoutingKey::Did => message.did.clone(),
            RoutingKey::Collection => message.collection.clone().unwrap_or_else(|| message.kind.to_owned()),
        }
    }

    async fn open(&self, name: &str) -> Result<Publisher, AmqpError> {
        Publisher::open(&self.server, &self.exchange, name).await
    }

    fn check(publisher: &mut Publisher) -> Result<(), AmqpError> {
        publisher.check()
    }

    async fn publish(publisher: &mut Publisher, messages: Vec<Outgoing>) -> Result<(), AmqpError> {
        publisher.publish(messages).await
    }

    async fn close(publisher: Publisher) {
        publisher.close().await;
    }

    fn is_refusal(error: &AmqpError) -> bool {
        matches!(error, AmqpError::Unroutable(_) | AmqpError::NotStored)
    }
}
