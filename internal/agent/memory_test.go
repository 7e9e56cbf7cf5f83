package agent

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
	const unlimited = "9223372036854771712"
	for _, c := range []struct {
		name  string
		self  string
		files map[string]string
		want  uint64
	}{
		{"none", "0::/\n", nil, 0},
		{"container", "0::/\n", map[string]string{"memory.max": "268435456"}, 256 << 20},
		{"unlimited", "0::/\n", map[string]string{"memory.max": "max"}, 0},
		{"service", "0::/system.slice/bauta.service\n", map[string]string{
			"system.slice/memory.max": "1073741824", "system.slice/bauta.service/memory.max": "536870912"}, 512 << 20},
		{"parent", "0::/kubepods/pod\n", map[string]string{"kubepods/memory.max": "1073741824", "kubepods/pod/memory.max": "max"}, 1 << 30},
		{"version 1", "4:memory:/pod\n3:cpu:/\n0::/\n", map[string]string{"memory/pod/memory.limit_in_bytes": "268435456", "memory/memory.limit_in_bytes": unlimited}, 256 << 20},
		{"version 1, container", "4:memory:/kubepods/pod\n0::/\n", map[string]string{"memory/memory.limit_in_bytes": "268435456"}, 256 << 20},
		{"rubbish", "x\n\n0::\n", map[string]string{"memory.max": "-1"}, 0},
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "self"), c.self)
		for path, text := range c.files {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, path), text+"\n")
		}
		if got := memoryLimit(filepath.Join(dir, "self"), dir); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// Tables of the default size take a third of a limit at most, by the figures of docs/operations.md.
func TestTablesFitIntoALimit(t *testing.T) {
	cfg := load(t, "pod-cidrs=10.1.0.0/16")
	const flow, total = 560 << 20 / 1048576, 1 << 40
	for limit := uint64(64 << 20); limit < total; limit *= 2 {
		if tables := uint64(cfg.Flows(forTables(total, limit))) * flow; tables > limit/3 {
			t.Errorf("limit %d MiB: tables of %d MiB", limit>>20, tables>>20)
		}
	}
	if got := forTables(16<<30, 9223372036854771712); got != 16<<30 {
		t.Errorf("no limit: %d", got)
	}
}
