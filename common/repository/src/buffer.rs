//! Memory that direct reads go into.

/// What every disk and file system here asks of direct I/O: address, offset and length in multiples of it.
pub(crate) const ALIGN: usize = 4096;

/// Bytes that begin at a multiple of [`ALIGN`].
#[derive(Default)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Makes it `len` bytes long; what it holds is anything.
    pub fn resize(&mut self, len: usize) {
        if self.memory.len() < len + ALIGN {
            self.memory = vec![0; len + ALIGN];
            let start = self.memory.as_ptr().align_offset(ALIGN);
            // "no such offset" is allowed to be the answer: then reads through it are not direct
            self.start = if start < ALIGN { start } else { 0 };
        }
        self.len = len;
    }

    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_stays_aligned_as_it_grows_and_moves() {
        let mut buffer = Buffer::default();
        for len in [1, 100, 4096, 1 << 20, 7] {
            buffer.resize(len);
            let mut moved = buffer;
            assert_eq!(moved.bytes().len(), len);
            assert_eq!(moved.bytes_mut().as_ptr().align_offset(ALIGN), 0);
            buffer = moved;
        }
    }
}
