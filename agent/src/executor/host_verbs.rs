//! Verbs for the host.

use muster_common::ErrorCode;
use muster_idl::{
    arguments::PullResult,
    v1::{Severity, TargetKind},
};

use super::{Done, Failure, Work, guest::json};
use crate::{arguments, voice::About};

impl Work {
    pub(super) async fn image_pull(&self) -> Result<Done, Failure> {
        let digest = arguments::digest(&self.order)?;
        let (image, pulled) = self.ensure_image(digest, &arguments::image_name(&self.order)).await?;
        let pulled = pulled.unwrap_or_default();
        let result = PullResult {
            logical_bytes: image.size().bytes(),
            transferred_bytes: pulled.transferred.bytes(),
            resident_bytes: pulled.resident.bytes(),
        };
        if self.host.volumes.store.image(&digest).is_none() {
            return Err(Failure::failed(ErrorCode::Internal, "the image is not resident after its pull"));
        }
        Ok(Done { message: String::new(), result: json(&result)? })
    }

    pub(super) async fn image_drop(&self) -> Result<Done, Failure> {
        let digest = arguments::digest(&self.order)?;
        self.blocking(move |host| match host.images.discard(&digest) {
            Ok(()) | Err(muster_store::StoreError::ImageNotFound(_)) => Ok(()),
            Err(e @ muster_store::StoreError::ImageInUse { .. }) => {
                Err(Failure::refused(ErrorCode::InUse, muster_common::Chain(&e).to_string()))
            }
            Err(e) => Err(e.into()),
        })
        .await?;
        Ok(Done::default())
    }

    pub(super) async fn set_draining(&self, draining: bool) -> Result<Done, Failure> {
        debug_assert_eq!(self.order.target_kind, TargetKind::Host);
        self.blocking(move |host| Ok(host.draining.set(draining)?)).await?;
        // done when the heartbeat says so, not up to a second before
        self.host.beat_now().await;
        let (kind, text) = if draining {
            ("host-draining", "the host takes no new work")
        } else {
            ("host-undrained", "the host takes work again")
        };
        let about = About { command: self.order.command.to_string(), ..About::default() };
        self.host.voice.event(Severity::Info, kind, text, about);
        Ok(Done::default())
    }
}
