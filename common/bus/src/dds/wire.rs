//! idl's types as RustDDS wants them: its traits on our wrappers (neither the traits nor the types are ours).

use std::{
    any::Any,
    cmp::Ordering,
    hash::{Hash, Hasher},
    marker::PhantomData,
};

use cdr_encoding_size::{CdrEncodingMaxSize, CdrEncodingSize};
use muster_idl::{Durability, Reliability, Topic, TopicInfo};
use rustdds::{
    Key, Keyed, QosPolicies, QosPolicyBuilder, RTPSEntity, ReadCondition, TopicKind,
    dds::{ReadError, WriteError, key::KeyHash},
    policy,
    with_key::{DataReaderCdr, DataWriterCdr, Sample},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{BusError, PUBLISH_TIMEOUT, queue::Erased};

struct Wire<T>(T);

impl<T: Topic> Serialize for Wire<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(s)
    }
}
impl<'de, T: Topic> Deserialize<'de> for Wire<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        T::deserialize(d).map(Self)
    }
}
impl<T: Topic> Keyed for Wire<T> {
    type K = WireKey<T>;
    fn key(&self) -> WireKey<T> {
        WireKey(self.0.key())
    }
}

/// The key on the wire.
///
/// RustDDS's readers remember every key they ever saw. Keys of volatile topics are without end (each command, each
/// verdict), and nobody asks for their instances: those all compare equal and hash to zero, so that one entry is
/// remembered. Disposal still carries the true key.
struct WireKey<T: Topic>(T::Key);

impl<T: Topic> WireKey<T> {
    const REMEMBERED: bool = matches!(T::INFO.profile.durability, Durability::TransientLocal);
}

impl<T: Topic> Clone for WireKey<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}
impl<T: Topic> PartialEq for WireKey<T> {
    fn eq(&self, other: &Self) -> bool {
        !Self::REMEMBERED || self.0 == other.0
    }
}
impl<T: Topic> Eq for WireKey<T> {}
impl<T: Topic> PartialOrd for WireKey<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<T: Topic> Ord for WireKey<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        if Self::REMEMBERED { self.0.cmp(&other.0) } else { Ordering::Equal }
    }
}
impl<T: Topic> Hash for WireKey<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        if Self::REMEMBERED {
            self.0.hash(state);
        }
    }
}
impl<T: Topic> Serialize for WireKey<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(s)
    }
}
impl<'de, T: Topic> Deserialize<'de> for WireKey<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        T::Key::deserialize(d).map(Self)
    }
}
impl<T: Topic> CdrEncodingSize for WireKey<T> {
    /// Every key of ours holds a string, so the key hash is always the MD5 one (RTPS 2.3, section 9.6.3.8).
    fn cdr_encoding_max_size() -> CdrEncodingMaxSize {
        CdrEncodingMaxSize::Unbounded
    }
}
impl<T: Topic> Key for WireKey<T> {
    fn hash_key(&self, _force_md5: bool) -> KeyHash {
        if !Self::REMEMBERED {
            return KeyHash::zero();
        }
        let mut big_endian = Vec::new();
        if cdr_encoding::to_writer::<_, byteorder::BigEndian, _>(&mut big_endian, &self.0).is_err() {
            return KeyHash::zero();
        }
        md5(&big_endian)
    }
}

/// The default of the trait, which an overriding method cannot call: on a wrapper that does not override it.
fn md5(big_endian: &[u8]) -> KeyHash {
    #[derive(PartialEq, Eq, PartialOrd, Ord, Hash, Clone)]
    struct Raw(Vec<u8>);
    impl Serialize for Raw {
        fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeTuple;
            // a tuple of octets has no length and no padding: the bytes themselves
            let mut tuple = s.serialize_tuple(self.0.len())?;
            for byte in &self.0 {
                tuple.serialize_element(byte)?;
            }
            tuple.end()
        }
    }
    impl CdrEncodingSize for Raw {
        fn cdr_encoding_max_size() -> CdrEncodingMaxSize {
            CdrEncodingMaxSize::Unbounded
        }
    }
    impl Key for Raw {}
    Raw(big_endian.to_vec()).hash_key(true)
}

/// How many unsent samples of a best-effort writer are kept. RustDDS counts per writer, and a host writes one sample
/// a VM at once: with the depth of 1 that the profile asks for, all but the last were lost before they were sent.
const BEST_EFFORT_BACKLOG: i32 = 1024;

/// The profile as QoS of a writer or of a reader of ours.
fn qos(info: TopicInfo, writer: bool) -> QosPolicies {
    let profile = info.profile;
    let max_samples = i32::try_from(profile.max_samples).unwrap_or(i32::MAX);
    let history = match (writer, profile.reliability, profile.history_depth) {
        // RustDDS's depth of a reader counts over all instances and all writers: only KEEP_ALL keeps one a host
        (false, _, _) | (true, Reliability::Reliable, 0) => policy::History::KeepAll,
        (true, Reliability::Reliable, depth) => policy::History::KeepLast { depth: i32::from(depth) },
        (true, Reliability::BestEffort, _) => policy::History::KeepLast { depth: BEST_EFFORT_BACKLOG },
    };
    let builder = QosPolicyBuilder::new()
        .history(history)
        .durability(match profile.durability {
            Durability::Volatile => policy::Durability::Volatile,
            Durability::TransientLocal => policy::Durability::TransientLocal,
        })
        .resource_limits(policy::ResourceLimits {
            max_samples,
            max_instances: max_samples,
            max_samples_per_instance: max_samples,
        });
    match profile.reliability {
        Reliability::Reliable => builder.reliable(rustdds::Duration::from_std(PUBLISH_TIMEOUT)),
        Reliability::BestEffort => builder.best_effort(),
    }
    .build()
}

/// Participant and its two factories, as long as a session lives.
pub(crate) struct Factories {
    pub participant: rustdds::DomainParticipant,
    pub publisher: rustdds::Publisher,
    pub subscriber: rustdds::Subscriber,
}

impl Factories {
    fn topic(&self, info: TopicInfo, writer: bool) -> Result<(rustdds::Topic, QosPolicies), BusError> {
        let qos = qos(info, writer);
        let topic = self
            .participant
            .create_topic(info.name.into(), info.type_name.into(), &qos, TopicKind::WithKey)
            .map_err(|e| BusError::Dds { attempted: format!("create topic {}", info.name), reason: e.to_string() })?;
        Ok((topic, qos))
    }
}

/// A writer whose type only its publisher knows.
pub(crate) trait DdsWriter: Send + Sync {
    fn write(&self, value: &dyn Any) -> Result<(), BusError>;
    fn dispose(&self, key: &dyn Any) -> Result<(), BusError>;
    fn guid(&self) -> rustdds::GUID;
}

/// A sample out of the DDS cache.
pub(crate) struct Taken {
    pub payload: Erased,
    pub writer: rustdds::GUID,
    pub sequence_number: i64,
}

/// A reader whose type only its subscriber knows.
pub(crate) trait DdsReader: Send {
    /// Up to `limit` samples in the order of each writer; and how many did not decode.
    fn take(&mut self, limit: usize) -> (Vec<Taken>, u64);
    fn source(&mut self) -> &mut dyn mio::event::Source;
    fn guid(&self) -> rustdds::GUID;
}

/// Makes writers and readers of one topic.
pub(crate) trait Endpoints: Send + Sync {
    fn writer(&self, factories: &Factories) -> Result<Box<dyn DdsWriter>, BusError>;
    fn reader(&self, factories: &Factories) -> Result<Box<dyn DdsReader>, BusError>;
}

pub(crate) struct TypedEndpoints<T>(PhantomData<fn() -> T>);

impl<T: Topic> TypedEndpoints<T> {
    pub(crate) const NEW: Self = Self(PhantomData);
}

impl<T: Topic> Endpoints for TypedEndpoints<T> {
    fn writer(&self, factories: &Factories) -> Result<Box<dyn DdsWriter>, BusError> {
        let (topic, qos) = factories.topic(T::INFO, true)?;
        let writer = factories.publisher.create_datawriter_cdr::<Wire<T>>(&topic, Some(qos)).map_err(|e| {
            BusError::Dds { attempted: format!("create writer of {}", T::INFO.name), reason: e.to_string() }
        })?;
        Ok(Box::new(TypedWriter::<T>(writer)))
    }
    fn reader(&self, factories: &Factories) -> Result<Box<dyn DdsReader>, BusError> {
        let (topic, qos) = factories.topic(T::INFO, false)?;
        let reader = factories.subscriber.create_datareader_cdr::<Wire<T>>(&topic, Some(qos)).map_err(|e| {
            BusError::Dds { attempted: format!("create reader of {}", T::INFO.name), reason: e.to_string() }
        })?;
        Ok(Box::new(TypedReader::<T>(reader)))
    }
}

struct TypedWriter<T: Topic>(DataWriterCdr<Wire<T>>);

fn write_error<D>(topic: &'static str, error: WriteError<D>) -> BusError {
    match error {
        WriteError::WouldBlock { .. } => BusError::Timeout { topic, waited_ms: PUBLISH_TIMEOUT.as_millis() as u64 },
        WriteError::Serialization { reason, .. } => BusError::Cdr { attempted: format!("publish on {topic}"), reason },
        WriteError::Poisoned { reason, .. } | WriteError::Internal { reason } => {
            BusError::Dds { attempted: format!("publish on {topic}"), reason }
        }
        WriteError::Io(source) => BusError::Io { attempted: format!("publish on {topic}"), source },
    }
}

impl<T: Topic> DdsWriter for TypedWriter<T> {
    fn write(&self, value: &dyn Any) -> Result<(), BusError> {
        let value = value.downcast_ref::<T>().ok_or(BusError::UnknownTopic { topic: T::INFO.name })?;
        self.0.write(Wire(value.clone()), None).map_err(|e| write_error(T::INFO.name, e))
    }
    fn dispose(&self, key: &dyn Any) -> Result<(), BusError> {
        let key = key.downcast_ref::<T::Key>().ok_or(BusError::UnknownTopic { topic: T::INFO.name })?;
        self.0.dispose(&WireKey(key.clone()), None).map_err(|e| write_error(T::INFO.name, e))
    }
    fn guid(&self) -> rustdds::GUID {
        self.0.guid()
    }
}

struct TypedReader<T: Topic>(DataReaderCdr<Wire<T>>);

impl<T: Topic> DdsReader for TypedReader<T> {
    fn take(&mut self, limit: usize) -> (Vec<Taken>, u64) {
        let mut malformed = 0;
        loop {
            match self.0.take(limit, ReadCondition::any()) {
                Ok(samples) => {
                    let taken = samples
                        .into_iter()
                        .map(|sample| {
                            let identity = sample.sample_info().sample_identity();
                            let payload = match sample.into_value() {
                                Sample::Value(Wire(value)) => Erased::Value(Box::new(value)),
                                Sample::Dispose(WireKey(key)) => Erased::Disposed(Box::new(key)),
                            };
                            Taken {
                                payload,
                                writer: identity.writer_guid,
                                sequence_number: identity.sequence_number.into(),
                            }
                        })
                        .collect();
                    return (taken, malformed);
                }
                // its read pointer has moved past the bad sample: what came after is there at the next take
                Err(ReadError::Deserialization { reason }) => {
                    tracing::warn!(topic = T::INFO.name, err = reason, "received a sample that is not of this type");
                    malformed += 1;
                }
                Err(error) => {
                    tracing::error!(topic = T::INFO.name, err = %error, "could not read from the dds library");
                    return (Vec::new(), malformed);
                }
            }
        }
    }
    fn source(&mut self) -> &mut dyn mio::event::Source {
        &mut self.0
    }
    fn guid(&self) -> rustdds::GUID {
        self.0.guid()
    }
}

#[cfg(test)]
mod tests {
    use muster_idl::v1::{PhysicalHost, VirtualSystem, VmKey};

    use super::*;

    #[test]
    fn the_key_hash_is_the_md5_of_the_big_endian_key() {
        let key = VmKey { host: "h".into(), vm: "v".into() };
        // md5 of 00000002 6800 0000 00000002 7600
        let mut expected = vec![0, 0, 0, 2, b'h', 0, 0, 0, 0, 0, 0, 2, b'v', 0];
        assert_eq!(WireKey::<VirtualSystem>(key).hash_key(false), md5(&expected));
        expected[4] = b'x';
        assert_ne!(
            WireKey::<PhysicalHost>(muster_idl::v1::HostKey { host: "h".into() }).hash_key(false),
            md5(&expected)
        );
    }
}
