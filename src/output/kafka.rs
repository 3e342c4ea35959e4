//! A Kafka topic.

use super::jetstream::Message;
use super::publish::Broker;
use crate::config::KafkaOutput;
use crate::event::Outgoing;
use crate::kafka::{KafkaError, Producer};
use crate::stream::output::Output;

impl Broker for KafkaOutput {
    const OUTPUT: Output = Output::Kafka;
    const NAME: &'static str = "Kafka";
    type Error = KafkaError;
    type Publisher = Producer;

    fn target(&self) -> (String, String) {
        (self.topic.clone(), self.cluster.servers().to_owned())
    }

    /// All events of an account go to one partition, in order.
    fn key(&self, message: &Message) -> String {
        message.did.clone()
    }

    async fn open(&self, name: &str) -> Result<Producer, KafkaError> {
        Producer::open(&self.cluster, &self.topic, name).await
    }

    fn check(_: &mut Producer) -> Result<(), KafkaError> {
        // It connects again by itself; what is not confirmed in time is an error.
        Ok(())
    }

    async fn publish(producer: &mut Producer, messages: Vec<Outgoing>) -> Result<(), KafkaError> {
        producer.publish(messages).await
    }

    async fn close(producer: Producer) {
        producer.close().await;
    }

    fn is_refusal(error: &KafkaError) -> bool {
        Self::is_final(error)
    }

    fn is_final(error: &KafkaError) -> bool {
        matches!(error, KafkaError::TooLarge(..))
    }
}
