package filewatch

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// digest stands for the content of all watched files.
type digest [sha256.Size]byte

// maxHashed bounds what is read of one file; its size counts in any case. No
// reader of these files accepts as much.
const maxHashed = 64 << 20

// digestOf reads everything. That a file is missing, or why it cannot be read, is
// part of the digest: it matters to those who read it next.
func digestOf(paths []string) digest {
	h := sha256.New()
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil || !info.IsDir() {
			hashFile(h, path)
			continue
		}
		fmt.Fprintf(h, "directory %q\n", path)
		for _, e := range files(path) {
			hashFile(h, filepath.Join(path, e.Name()))
		}
	}
	return digest(h.Sum(nil))
}

// files lists the entries of a directory that count: neither the kubelet's own
// (..data), nor hidden files and backups of editors. An unreadable directory has none.
func files(dir string) []fs.DirEntry {
	entries, _ := os.ReadDir(dir) // what could be read in spite of an error counts
	kept := entries[:0]
	for _, e := range entries {
		if !e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !strings.HasSuffix(e.Name(), "~") {
			kept = append(kept, e)
		}
	}
	return kept
}

func hashFile(h io.Writer, path string) {
	// O_NONBLOCK: a pipe must not hold us.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		hashError(h, path, err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		hashError(h, path, err)
	case !info.Mode().IsRegular():
		fmt.Fprintf(h, "other %q %s\n", path, info.Mode().Type())
	default:
		content := sha256.New()
		n, err := io.Copy(content, io.LimitReader(f, maxHashed))
		fmt.Fprintf(h, "file %q %d %d %x\n", path, info.Size(), n, content.Sum(nil))
		if err != nil {
			hashError(h, path, err)
		}
	}
}

func hashError(h io.Writer, path string, err error) {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	fmt.Fprintf(h, "error %q %v\n", path, err)
}
