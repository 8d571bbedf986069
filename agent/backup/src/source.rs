use muster_block::{BlockDevice, Extent, ExtentKind};
use muster_common::ByteLen;
use muster_repository::source::{ReadAt, SourceError, Span};

/// Reads a block device as a source of the repository (also to import a volume as an image).
pub struct DeviceSource<'a> {
    device: &'a dyn BlockDevice,
    size: ByteLen,
}

impl<'a> DeviceSource<'a> {
    /// The device should not change while it is read: give a snapshot. Its size is looked at once, here.
    pub fn new(device: &'a dyn BlockDevice) -> Self {
        Self { device, size: device.geometry().size }
    }
}

impl ReadAt for DeviceSource<'_> {
    fn size(&self) -> ByteLen {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        self.device.read_at(offset, buf).map_err(|source| SourceError::Read { offset, source: Box::new(source) })
    }

    fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
        let len = len.min(self.size.0.saturating_sub(offset));
        let mut extents: Vec<Extent> = Vec::new();
        self.device
            .block_status(offset, len, &mut extents)
            .map_err(|source| SourceError::Read { offset, source: Box::new(source) })?;
        out.extend(extents.iter().map(|e| Span { len: e.len, zero: e.kind == ExtentKind::Hole }));
        Ok(())
    }
}
