package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"time"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
	"bauta.dev/bauta/internal/policy"
)

// ipMasqFile is the ip-masq-agent list in force and how it came to be. A bad file
// leaves the last good list in force (section 5).
type ipMasqFile struct {
	loader     ipmasq.Loader
	list       ipmasq.List
	origin     IPMasqOrigin // zero: not read yet
	lastReload time.Time    // of the last good one
	err        error        // why the file as it is now is rejected
}

// reload reads the file and tells whether it is another than at the last reading. With
// a bad one at first start the list of an earlier agent stays.
func (f *ipMasqFile) reload(now time.Time, before earlier, log *slog.Logger) (news bool) {
	list, err := f.loader.Load()
	if err == nil {
		news = f.origin != FromFile || f.list.State != list.State || !slices.Equal(list.Rules, f.list.Rules)
		if news {
			log.Info("ip-masq-agent list loaded", "path", f.loader.Path, "state", list.State, "prefixes", len(list.Rules))
		}
		f.list, f.origin, f.lastReload, f.err = list, FromFile, now, nil
		return news
	}
	switch f.origin {
	case FromFile:
		f.origin = FromLastGood
	case "":
		f.list, f.origin = ipmasq.Defaults(f.loader.Profile), FromDefaults
		if rules, ok := before.nonMasq(); ok {
			f.list, f.origin = ipmasq.List{Rules: rules, State: ipmasq.Fallback, Profile: f.loader.Profile}, FromPinned
		}
	}
	news = logRejected(log, f.err, err, "in_force", f.origin)
	f.err = err
	return news
}

// logRejected logs a rejected file once, not at every reading. It tells whether this is
// the first.
func logRejected(log *slog.Logger, before, now error, args ...any) bool {
	if before != nil && before.Error() == now.Error() {
		return false
	}
	log.Error("config rejected", append([]any{"error", now}, args...)...)
	return true
}

func (f *ipMasqFile) status() IPMasqStatus {
	s := IPMasqStatus{
		Enabled: true, Path: f.loader.Path, Profile: string(f.loader.Profile), State: string(f.list.State), InForce: f.origin,
		Files: f.list.Files, LastReload: f.lastReload, Warnings: f.list.Warnings,
	}
	for _, key := range f.list.Ignored {
		s.Warnings = append(slices.Clip(s.Warnings), key+": has no effect")
	}
	if f.err != nil {
		s.LastError = f.err.Error()
	}
	return s
}

// nodesFile is the list of other nodes in force.
type nodesFile struct {
	path       string
	nodes      []policy.NodeAddr
	loaded     bool // nodes is what some file or an earlier agent said
	lastReload time.Time
	err        error
}

// reload reads the file and tells whether it is another than at the last reading. A
// missing one is an error: the option names it, and forgetting the nodes would
// masquerade towards them.
func (f *nodesFile) reload(now time.Time, before earlier, log *slog.Logger) (news bool) {
	nodes, err := readNodes(f.path)
	if err == nil {
		news = !f.loaded || f.err != nil || !slices.Equal(nodes, f.nodes)
		if news {
			log.Info("nodes-file loaded", "path", f.path, "addresses", len(nodes))
		}
		f.nodes, f.loaded, f.lastReload, f.err = nodes, true, now, nil
		return news
	}
	if !f.loaded {
		f.nodes, f.loaded = before.nodes(f.path), true
	}
	news = logRejected(log, f.err, err, "addresses", len(f.nodes))
	f.err = err
	return news
}

func (f *nodesFile) status() NodesStatus {
	s := NodesStatus{File: f.path, LastReload: f.lastReload}
	if f.err != nil {
		s.LastError = f.err.Error()
	}
	return s
}

// maxNodesFile bounds what is read: 5,000 nodes with ten addresses each take less.
const maxNodesFile = 8 << 20

func readNodes(path string) ([]policy.NodeAddr, error) {
	data, err := readRegular(path, maxNodesFile)
	if err != nil {
		return nil, fmt.Errorf("nodes-file %s: %w", path, err)
	}
	nodes, err := config.ParseNodes(bytes.NewReader(data), path)
	if err != nil {
		return nil, fmt.Errorf("nodes-file %w", err)
	}
	return nodes, nil
}

// readRegular reads a whole file of at most limit bytes. Errors are without the
// path. Reading a pipe would block, so only regular files are read.
func readRegular(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, advice.Bare(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, advice.Bare(err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, advice.Bare(err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("more than %d bytes", limit)
	}
	return data, nil
}

// optionFiles compares the option files with what the agent runs with: options
// themselves are read once, at the start.
type optionFiles struct {
	running config.Config
	sources config.Sources
	changed []string // options that a restart would change
	err     error
}

// reload reads the files and tells whether they say something else than at the last
// reading.
func (f *optionFiles) reload(log *slog.Logger) (news bool) {
	if f.sources.File == "" && f.sources.Dir == "" {
		return false // flags and environment stay as they are
	}
	next, err := config.Load(f.sources)
	if err != nil {
		news = logRejected(log, f.err, err)
		f.err = err
		return news
	}
	changed := f.running.Changed(next)
	news = f.err != nil || !slices.Equal(changed, f.changed)
	if len(changed) > 0 && !slices.Equal(changed, f.changed) {
		log.Warn("restart needed", "options", changed)
	}
	f.changed, f.err = changed, nil
	return news
}

// noteReload remembers whether a file was another than at its last reading.
func (l *loop) noteReload(now time.Time, news bool, err error) {
	if news {
		l.news = true
		l.reloads.Add(now, err == nil)
	}
}
