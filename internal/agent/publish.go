package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/config"
)

// announce shows readers an agent that has applied nothing yet.
func (l *loop) announce() {
	l.wanted = assemble(l.cfg, l.facts)
	l.publish()
}

// publish writes policy.json if it has changed, and shows the state to readers.
func (l *loop) publish() {
	v := &view{agent: l.agent, missing: l.wanted.selection.Missing, portsError: l.portsError, reloads: l.reloads}
	if l.kernel != nil {
		v.attached = l.kernel.Attached()
	}
	if l.options.err != nil {
		v.agent.ConfigError = l.options.err.Error()
	}
	if l.inForce != nil {
		v.file = l.policyFile(*l.inForce)
		l.write(&v.file)
	} else {
		v.file = l.policyFile(l.wanted)
	}
	v.warnings = l.warnings()
	before := l.published.Swap(v)
	if l.agent.Ready {
		l.systemd.ready() // not before readers can see it
	}
	l.logWarnings(v.warnings)
	if l.attempted {
		l.tell(momentOf(v, l.foreign.warnings))
		l.liftTaint(v)
	}
	if text := v.summary(); before == nil || before.summary() != text {
		l.systemd.status(text)
	}
}

func (l *loop) policyFile(w wanted) PolicyFile {
	f := newPolicyFile(w)
	f.PID, f.Version, f.Started = l.agent.PID, l.agent.Version, l.agent.Started
	f.Draining = l.changeover.draining()
	if l.kube != nil {
		f.Node = l.cfg.NodeName
	}
	if l.ipMasq != nil {
		f.IPMasqAgent = l.ipMasq.status()
	}
	if l.nodes != nil {
		f.NodesFile = l.nodes.status()
	}
	return f
}

func (l *loop) write(f *PolicyFile) {
	f.Written = l.written.Written
	_, gone := os.Stat(filepath.Join(l.runDir, policyFileName)) // the next agent needs it
	if gone == nil && l.writeErr == nil && f.same(l.written) {
		return
	}
	f.Written = time.Now()
	err := f.write(l.runDir)
	if err != nil && (l.writeErr == nil || l.writeErr.Error() != err.Error()) {
		l.log.Warn("policy file not written, retrying", "error", err, "after", l.timing.resync)
	}
	if l.writeErr = err; err == nil {
		l.written = *f
	}
}

// warnings are what an operator should know and nothing else shows.
func (l *loop) warnings() []string {
	list := configWarnings(l.cfg)
	if len(l.options.changed) > 0 {
		list = append(list, "restart needed: the files have other values now for "+strings.Join(l.options.changed, ", "))
	}
	for _, name := range l.wanted.selection.Missing {
		text := fmt.Sprintf("device %s is missing: it will be attached when it appears", name)
		if prefix, ok := strings.CutSuffix(name, "*"); ok {
			text += fmt.Sprintf(" (all that begin with %s are written %[1]s+)", prefix)
		}
		list = append(list, text)
	}
	for _, pattern := range l.wanted.selection.Unmatched {
		list = append(list, fmt.Sprintf("%s: no device matches %s now: one that does will be attached when it appears", l.devicesOption(), pattern))
	}
	if l.kernel != nil {
		list = append(list, l.kernel.Warnings()...)
	}
	list = append(list, l.foreign.warnings...)
	list = append(list, l.kubeWarnings()...)
	if l.cfg.IPv6 && l.facts.noIPv6 {
		list = append(list, "IPv6: this kernel has none")
	}
	if l.writeErr != nil {
		list = append(list, l.writeErr.Error())
	}
	return list
}

// devicesOption is the option that names the devices.
func (l *loop) devicesOption() string {
	if len(l.cfg.EgressInterfaces) > 0 {
		return "egress-masquerade-interfaces"
	}
	return "devices"
}

// logWarnings logs each warning when it comes up.
func (l *loop) logWarnings(list []string) {
	if !l.attempted {
		return // the node's devices have not been read yet
	}
	for _, w := range list {
		if !slices.Contains(l.warned, w) {
			l.log.Warn(w)
		}
	}
	l.warned = list
}

// configWarnings are known when the options are.
func configWarnings(cfg config.Config) []string {
	list := append([]string(nil), cfg.Warnings...)
	if len(cfg.Ignored) > 0 {
		list = append(list, "keys of the config directory without effect here: "+strings.Join(cfg.Ignored, ", "))
	}
	return list
}

// summary is one line for the service manager.
func (v *view) summary() string {
	switch {
	case v.agent.Waiting != "":
		return "waiting: " + v.agent.Waiting
	case v.agent.Error != "":
		return "policy not applied: " + v.agent.Error
	case v.file.State4 == SourcesOff && v.file.State6 == SourcesOff:
		return "masquerading is off"
	}
	var names []string
	for _, d := range v.file.Devices {
		names = append(names, d.Name)
	}
	text := fmt.Sprintf("masquerading on %s", orDefault(strings.Join(names, ", "), "no device"))
	if v.agent.AttachError != "" {
		text += "; " + v.agent.AttachError
	}
	return text
}
