// Asks a SavedModel in TensorFlow's C++ runtime, without Python.
//
//     ask_savedmodel FOLDER OUTPUT INDEX INPUT=1,2,3 [INPUT=@TEXT ...]
//
// Loads the model as TF Serving does, feeds one row to each input, of integers
// or one string of shape (1,), and prints the numbers of one output. Inputs and outputs are operations of the
// graph, as the signature names them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tstring.h"

static void check(TF_Status* status) {
  if (TF_GetCode(status) == TF_OK) return;
  std::fprintf(stderr, "%s\n", TF_Message(status));
  std::exit(1);
}

static TF_Tensor* row(const std::string& numbers) {
  std::vector<int32_t> values;
  std::istringstream stream(numbers);
  for (std::string number; std::getline(stream, number, ',');)
    values.push_back(std::stoi(number));
  const int64_t shape[] = {1, static_cast<int64_t>(values.size())};
  const size_t bytes = values.size() * sizeof(int32_t);
  TF_Tensor* tensor = TF_AllocateTensor(TF_INT32, shape, 2, bytes);
  std::memcpy(TF_TensorData(tensor), values.data(), bytes);
  return tensor;
}

static TF_Tensor* text(const std::string& value) {
  const int64_t shape[] = {1};
  TF_Tensor* tensor =
      TF_AllocateTensor(TF_STRING, shape, 1, sizeof(TF_TString));
  TF_TString* string = static_cast<TF_TString*>(TF_TensorData(tensor));
  TF_StringInit(string);
  TF_StringCopy(string, value.data(), value.size());
  return tensor;
}

int main(int count, char** words) {
  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(
      TF_NewSessionOptions(), nullptr, words[1], tags, 1, graph, nullptr,
      status);
  check(status);
  std::vector<TF_Output> inputs;
  std::vector<TF_Tensor*> rows;
  for (int i = 4; i < count; ++i) {
    const std::string word = words[i];
    const size_t at = word.find('=');
    const std::string name = word.substr(0, at);
    inputs.push_back({TF_GraphOperationByName(graph, name.c_str()), 0});
    const std::string value = word.substr(at + 1);
    rows.push_back(value[0] == '@' ? text(value.substr(1)) : row(value));
  }
  const TF_Output out = {TF_GraphOperationByName(graph, words[2]),
                         std::atoi(words[3])};
  TF_Tensor* answer = nullptr;
  TF_SessionRun(session, nullptr, inputs.data(), rows.data(), inputs.size(),
                &out, &answer, 1, nullptr, 0, nullptr, status);
  check(status);
  const float* values = static_cast<const float*>(TF_TensorData(answer));
  for (int64_t i = 0; i < TF_TensorElementCount(answer); ++i)
    std::printf("%.9g\n", values[i]);
}
