package agent

import (
	"fmt"
	"time"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/metrics"
)

// scrapeMeter is what of the programs can be read without a walk through the flows.
type scrapeMeter interface {
	Counts() ([]datapath.Count, error)
	PortSearches() (datapath.PortSearches, error)
	Limits() [2]datapath.Usage
	Reclaimed() (uint64, error)
	Leaks() (devices, samples []datapath.Leak, err error)
	Pods(most int) ([]datapath.Pod, error)
}

// reading is what a scrape shows: the last view, the last walk, and what the kernel says now.
// It is called beside the loop.
func (l *loop) reading() (metrics.Reading, error) {
	v := l.published.Load()
	health := v.health(time.Now())
	now, err := v.status(time.Now(), nil)
	if err != nil {
		return metrics.Reading{}, err
	}
	r := metrics.Reading{
		Version: v.agent.Version, Mode: v.file.Mode,
		Ready:       len(health.Unready()) == 0,
		ConfigValid: len(health.configErrors()) == 0,
		Reloads:     v.reloads, Prefixes: len(v.file.NonMasq), Nodes: health.Nodes.Known,
		Walks: l.walks.Load(),
	}
	k, err := l.inspect()
	switch {
	case isNone(err): // rules are there from the first apply on
		r.Devices = readingDevices(now.Devices)
		return r, nil
	case err != nil:
		return r, err
	}
	defer k.Close()
	attached, err := k.Attachments()
	if err != nil {
		return r, fmt.Errorf("read attachments: %w", err)
	}
	now.addAttached(attached)
	r.Devices = readingDevices(now.Devices)
	if m, ok := k.(scrapeMeter); ok {
		r.Programs, err = readPrograms(m, &now, attached, l.cfg.MetricsPerPod)
	} else if m, ok := k.(netfilterMeter); ok {
		r.Netfilter, err = readNetfilter(m)
	}
	return r, err
}

// readPrograms reads the maps. The status names the devices.
func readPrograms(k scrapeMeter, s *Status, attached []datapath.Attachment, pods int) (*metrics.Programs, error) {
	p := &metrics.Programs{Limits: k.Limits()}
	var err error
	if p.Counts, err = k.Counts(); err != nil {
		return nil, err
	}
	if p.Searches, err = k.PortSearches(); err != nil {
		return nil, err
	}
	if p.Reclaimed, err = k.Reclaimed(); err != nil {
		return nil, err
	}
	leaks, _, err := k.Leaks()
	if err != nil {
		return nil, err
	}
	s.addLeaks(attached, leaks, nil)
	if s.Leaks.Sentinel {
		p.Leaked = make(map[string]uint64)
		for _, a := range attached {
			p.Leaked[a.Device] = 0
		}
		for _, l := range s.Leaks.Devices {
			p.Leaked[l.Device] += l.Packets
		}
	}
	if pods > 0 {
		p.Pods, err = k.Pods(pods)
	}
	return p, err
}

func readNetfilter(k netfilterMeter) (*metrics.Netfilter, error) {
	drops, err := k.Drops()
	if err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	used, err := k.Conntrack()
	return &metrics.Netfilter{Drops: drops, Entries: used.Entries, Maximum: used.Limit}, err
}

// readingDevices are those of a status. Rules look at leaving packets only.
func readingDevices(list []DeviceStatus) []metrics.Device {
	var out []metrics.Device
	for _, d := range list {
		m := metrics.Device{Name: d.Name, Hook: string(d.Hook), Directions: []string{"egress", "ingress"}, IPv4: d.IPv4, IPv6: d.IPv6}
		m.Attached = d.State == DeviceAttached || d.State == DeviceDraining
		switch d.Hook {
		case "":
			m.Hook = "none"
		case HookIPTables:
			m.Directions = m.Directions[:1]
		}
		out = append(out, m)
	}
	return out
}
