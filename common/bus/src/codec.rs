//! CDR of the topics' types, behind a table: the generic code of the DDS library is compiled here once, not in each
//! program that uses the bus.

use std::{any::Any, marker::PhantomData};

use byteorder::LittleEndian;
use muster_idl::{Topic, TopicInfo, v1};
use serde::{Serialize, de::DeserializeOwned};

use crate::{BusError, dds};

/// A type whose concrete form only its publisher and its subscriber know.
pub(crate) trait Codec: Send + Sync {
    fn info(&self) -> TopicInfo;
    fn encode(&self, value: &dyn Any) -> Result<Vec<u8>, BusError>;
    fn decode(&self, bytes: &[u8]) -> Result<Box<dyn Any + Send>, BusError>;
    fn encode_key(&self, key: &dyn Any) -> Result<Vec<u8>, BusError>;
    fn decode_key(&self, bytes: &[u8]) -> Result<Box<dyn Any + Send>, BusError>;
    /// The key of a value, in CDR.
    fn key_of(&self, value: &dyn Any) -> Result<Vec<u8>, BusError>;
    fn endpoints(&self) -> &dyn dds::Endpoints;
}

struct Typed<T>(PhantomData<fn() -> T>);

impl<T: Topic> Typed<T> {
    fn value<'a>(&self, value: &'a dyn Any) -> Result<&'a T, BusError> {
        value.downcast_ref().ok_or(BusError::UnknownTopic { topic: T::INFO.name })
    }
}

pub(crate) fn to_cdr<V: Serialize>(attempted: &str, value: &V) -> Result<Vec<u8>, BusError> {
    cdr_encoding::to_vec::<V, LittleEndian>(value)
        .map_err(|e| BusError::Cdr { attempted: attempted.into(), reason: e.to_string() })
}

pub(crate) fn from_cdr<V: DeserializeOwned>(attempted: &str, bytes: &[u8]) -> Result<V, BusError> {
    cdr_encoding::from_bytes::<V, LittleEndian>(bytes)
        .map(|(value, _)| value)
        .map_err(|e| BusError::Cdr { attempted: attempted.into(), reason: e.to_string() })
}

impl<T: Topic> Codec for Typed<T> {
    fn info(&self) -> TopicInfo {
        T::INFO
    }
    fn encode(&self, value: &dyn Any) -> Result<Vec<u8>, BusError> {
        to_cdr(T::INFO.name, self.value(value)?)
    }
    fn decode(&self, bytes: &[u8]) -> Result<Box<dyn Any + Send>, BusError> {
        Ok(Box::new(from_cdr::<T>(T::INFO.name, bytes)?))
    }
    fn encode_key(&self, key: &dyn Any) -> Result<Vec<u8>, BusError> {
        let key = key.downcast_ref::<T::Key>().ok_or(BusError::UnknownTopic { topic: T::INFO.name })?;
        to_cdr(T::INFO.name, key)
    }
    fn decode_key(&self, bytes: &[u8]) -> Result<Box<dyn Any + Send>, BusError> {
        Ok(Box::new(from_cdr::<T::Key>(T::INFO.name, bytes)?))
    }
    fn key_of(&self, value: &dyn Any) -> Result<Vec<u8>, BusError> {
        to_cdr(T::INFO.name, &self.value(value)?.key())
    }
    fn endpoints(&self) -> &dyn dds::Endpoints {
        const { &dds::TypedEndpoints::<T>::NEW }
    }
}

/// The codec of a topic type; an error for a type that is not in idl's table.
pub(crate) fn of<T: Topic>() -> Result<&'static dyn Codec, BusError> {
    by_name(T::INFO.name).ok_or(BusError::UnknownTopic { topic: T::INFO.name })
}

macro_rules! table {
    ($($ty:ident)+) => {
        fn by_name(name: &str) -> Option<&'static dyn Codec> {
            $(if name == <v1::$ty as Topic>::INFO.name {
                return Some(const { &Typed::<v1::$ty>(PhantomData) });
            })+
            None
        }
    };
}

table! {
    Heartbeat PhysicalHost HostMetrics StoreState StoreHealth VirtualSystem VmMetrics VolumeMetrics Verdict Progress
    Event ControllerState GroupSet GroupCommand
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_of_the_table_has_a_codec() {
        for info in muster_idl::topics::ALL {
            assert_eq!(by_name(info.name).map(|c| c.info()), Some(*info));
        }
    }

    proptest::proptest! {
        /// Bytes come from the network: whatever they are, they are a value or an error.
        #[test]
        fn decoding_never_panics(topic in 0..muster_idl::topics::ALL.len(), bytes in proptest::collection::vec(0u8..=255, 0..300)) {
            if let Some(codec) = by_name(muster_idl::topics::ALL[topic].name) {
                let _ = codec.decode(&bytes);
                let _ = codec.decode_key(&bytes);
            }
        }
    }
}
