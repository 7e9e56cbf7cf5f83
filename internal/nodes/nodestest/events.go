package nodestest

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Events are those that were posted, a line each, as they are now.
func (s *Server) Events() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(s.events)) {
		e := s.events[name]
		lines = append(lines, fmt.Sprintf("%s %s %s x%d: %s", e.Type, e.Reason, e.InvolvedObject.Name, e.Count, e.Message))
	}
	return lines
}

// EventRequests is how many requests there were to write an event.
func (s *Server) EventRequests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.posts
}

var eventResource = schema.GroupResource{Resource: "events"}

func (s *Server) serveEvents(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.posts++
	e := &corev1.Event{}
	_, name, _ := strings.Cut(r.URL.Path, "/events/")
	switch r.Method {
	case http.MethodPost:
		if err := json.Unmarshal(body, e); err != nil {
			fail(w, r, apierrors.NewBadRequest(err.Error()))
			return
		}
		if s.events[e.Name] != nil {
			fail(w, r, apierrors.NewAlreadyExists(eventResource, e.Name))
			return
		}
	case http.MethodPatch:
		old := s.events[name]
		if old == nil {
			fail(w, r, apierrors.NewNotFound(eventResource, name))
			return
		}
		e = old.DeepCopy()
		if err := json.Unmarshal(body, e); err != nil { // a merge patch of fields without lists
			fail(w, r, apierrors.NewBadRequest(err.Error()))
			return
		}
	}
	if problem := invalid(e); problem != "" {
		fail(w, r, apierrors.NewBadRequest(problem))
		return
	}
	s.events[e.Name] = e
	w.Header().Set("Content-Type", jsonType)
	json.NewEncoder(w).Encode(e)
}

// invalid is what kube-apiserver refuses.
func invalid(e *corev1.Event) string {
	switch {
	case e.Namespace != "default":
		return "namespace: does not match that of the involved object, which has none: want default"
	case e.Name == "", len(e.Name) > 253:
		return "name"
	case e.Type != corev1.EventTypeNormal && e.Type != corev1.EventTypeWarning:
		return "type"
	case e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name == "":
		return "involvedObject"
	case len(e.Message) > 1024:
		return "message: more than 1024 letters"
	case len(e.Reason) > 128:
		return "reason: more than 128 letters"
	}
	return ""
}

// serveNode answers for one node: get, and a JSON patch of it.
func (s *Server) serveNode(w http.ResponseWriter, r *http.Request, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[name]
	if n == nil {
		fail(w, r, apierrors.NewNotFound(schema.GroupResource{Resource: "nodes"}, name))
		return
	}
	if r.Method == http.MethodPatch {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		var refused *apierrors.StatusError
		if n, refused = patched(n, body); refused != nil {
			fail(w, r, refused)
			return
		}
		n = s.put(n)
		s.wake()
	}
	if accepts(r, protobufType) {
		w.Header().Set("Content-Type", protobufType)
		w.Write(encode("Node", n))
		return
	}
	w.Header().Set("Content-Type", jsonType)
	json.NewEncoder(w).Encode(n)
}

// patched is a node after a merge patch. Its resource version, if the patch has one, must be
// that of the node.
func patched(n *corev1.Node, body []byte) (*corev1.Node, *apierrors.StatusError) {
	var patch struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
		Spec struct {
			Taints *[]corev1.Taint `json:"taints"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(body, &patch); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if v := patch.Metadata.ResourceVersion; v != "" && v != n.ResourceVersion {
		return nil, apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, n.Name, fmt.Errorf("the object has been modified"))
	}
	n = n.DeepCopy()
	if patch.Spec.Taints != nil {
		n.Spec.Taints = *patch.Spec.Taints
	}
	return n, nil
}
