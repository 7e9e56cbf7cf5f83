package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
)

// Names of the pins below the root directory. Map pins are the maps' own names.
const (
	pinForward4  = "forward4"
	pinForward6  = "forward6"
	pinReverse4  = "reverse4"
	pinReverse6  = "reverse6"
	pinInbound4  = "inbound4"
	pinInbound6  = "inbound6"
	pinFragments = "fragments"
	pinPolicies  = "policies"
	pinControl   = "control"
	pinSettings  = "settings"
	pinCounters  = "counters"
	pinDevices   = "devices"
	pinPods      = "pods"
	pinShares    = "shares"
	pinRefusals  = "refusals"
	pinStats     = "stats"
	pinReap      = "reap"
	pinReclaim   = "reclaim"
	pinTunnels   = "tunnels"
	pinLeaks     = "leaks"
	pinLeaked    = "leaked"
)

var fixedPins = []string{
	pinForward4, pinForward6, pinReverse4, pinReverse6, pinInbound4, pinInbound6, pinFragments,
	pinPolicies, pinControl, pinSettings, pinCounters, pinDevices,
	pinPods, pinShares, pinRefusals, pinStats, pinReap, pinReclaim, pinTunnels, pinLeaks, pinLeaked,
}

// newSuffix marks a pin that is about to take the place of another one.
const newSuffix = "_new"

var trieNames = [tries]string{trieSource: "source", trieDestination: "destination", trieRoute: "route", trieRemoved: "removed"}

// pinTrie names the pin of one table of a generation, for readers: a map in a map
// can't be opened through its outer map without CAP_SYS_ADMIN.
func pinTrie(generation uint32, which int) string {
	return fmt.Sprintf("%s_%d", trieNames[which], tableSet(generation))
}

// pinLink names the pin of a tcx link.
func pinLink(dir direction, index int) string { return fmt.Sprintf("%s_%d", dir, index) }

func parsePinLink(name string) (dir direction, index int, ok bool) {
	for _, dir := range backwards {
		if s, found := strings.CutPrefix(name, dir.String()+"_"); found {
			index, err := strconv.Atoi(s)
			return dir, index, err == nil
		}
	}
	return 0, 0, false
}

const markPrefix = "clsact_"

// markQdisc remembers that the clsact qdisc of a device is ours: a directory,
// because a bpffs holds nothing else but objects.
func markQdisc(root string, index int) string {
	return filepath.Join(root, markPrefix+strconv.Itoa(index))
}

// ownPin tells whether Bauta makes a pin of that name. Nothing else below the
// root directory is ever removed: users point --bpf-root at the wrong place.
func ownPin(name string) bool {
	name = strings.TrimSuffix(name, newSuffix)
	if slices.Contains(fixedPins, name) {
		return true
	}
	prefix, number, found := strings.Cut(name, "_")
	if _, err := strconv.Atoi(number); !found || err != nil {
		return false
	}
	return slices.Contains(trieNames[:], prefix) || slices.Contains([]string{"egress", "ingress", "sentinel", "clsact"}, prefix)
}

// pinNames lists what is below root, without what others put there.
func pinNames(root string) ([]string, error) {
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("bpf-root: %w", err)
	}
	var names []string
	for _, e := range entries {
		if ownPin(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// removeStale removes half-made pins of a crash: such an object never worked.
func removeStale(root string) error {
	names, err := pinNames(root)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasSuffix(name, newSuffix) {
			if err := os.Remove(filepath.Join(root, name)); err != nil {
				return fmt.Errorf("remove stale pin: %w", err)
			}
		}
	}
	return nil
}

// attachmentPin tells whether a pin belongs to a device and not to the tables.
func attachmentPin(name string) bool {
	_, _, ok := parsePinLink(name)
	return ok || strings.HasPrefix(name, markPrefix)
}

// replacePin pins an object at path, over what is there, without a moment in between.
func replacePin(pin func(string) error, path string) error {
	tmp := path + newSuffix
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale pin: %w", err)
	}
	if err := pin(tmp); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	return nil
}

// replaceMapPin is replacePin for a map that may have pins already: those of the
// library remember one place, and move the pin instead of adding one.
func replaceMapPin(m *ebpf.Map, path string) error {
	other, err := m.Clone()
	if err != nil {
		return err
	}
	defer other.Close()
	return replacePin(other.Pin, path)
}
